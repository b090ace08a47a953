"""What a federation's registry says of itself, and what a participant needs to reach it: values that both sides speak."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.manifest import BaseIdentity, Record

DEFAULT_PORT = 7401
"""Where a registry listens unless something else is said."""
NAME_KEY = "seedbed-participant-bin"
"""Metadata by which a participant without a certificate says its name."""
ERROR_KEY, HINT_KEY = "seedbed-error-bin", "seedbed-hint-bin"
"""Trailing metadata of a refusal: its class in `errors`, and the next step."""
MESSAGE_LIMIT = 10_000_000
"""Bytes of one message: a header with its two documents is the largest."""
CHUNK = 1 << 18
"""Bytes of tensors in one message: with larger ones many transfers at once take more memory and are no faster."""

State = Literal["waiting", "running", "finished", "failed"]


class RegistryAccess(Record):
    """How to reach a registry. Files are named, not held: no secret travels in a message or stands in a log."""

    address: str
    """``host:port``."""
    ca: Path | None = None
    """Certificate of the authority that signed the registry's; without it the connection is plaintext."""
    certificate: Path | None = None
    """The participant's own, whose common name is who it is."""
    key: Path | None = None
    name: str = ""
    """The participant's name: under TLS the certificate's decides, without it this is what the registry is told."""


class FederationInfo(Record):
    """What a participant must know of a federation before it does anything for it."""

    format: Literal[1] = 1
    name: str
    version: str
    """Of Seedbed, at the coordinator."""
    state: State
    base: BaseModelConfig
    identity: BaseIdentity
    lora: LoraSettings
    tasks: tuple[str, ...]
    """Held-in tasks, one expert each."""
    held_out: tuple[str, ...] = ()
    prompt: str = "Q: {prompt}\nA:"
    needs_general_text: bool = False
    training: TrainingSettings | None = None
    """What a job will take, as the coordinator's greeting over HTTP tells; the registry does not."""
    registry_port: int = DEFAULT_PORT
    secure: bool = False
    """TLS with certificates on both sides."""
    seed: str = ""
    """Digest of the shared seed adapter, once there is one."""
    best: str = ""
    """Digest of the best candidate, once it is known."""


class Contribution(Record):
    """An expert that was trained elsewhere and handed in."""

    digest: str
    task: str
    name: str
    """What tables call it; the task where nothing else was said."""
    participant: str
    """Who handed it in, and alone may withdraw it."""
    time: float
    """Unix time, in seconds."""
    withdrawn: bool = False
