"""From scores and lineage to one `Results`: what a run found, with what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seedbed.common.versions import software_versions
from seedbed.server.combination import Combination
from seedbed.server.evaluation import report, statistics
from seedbed.server.evaluation.results import CandidateResult, Results, score_of, summarize
from seedbed.server.evaluation.suite import TaskResult
from seedbed.server.lineage import Ancestry, total
from seedbed.server.rundir import RunDirectory
