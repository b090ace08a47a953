"""A base model of one million parameters and sixteen small tasks, so that `seedbed simulate` runs anywhere.

`pretrain.py` made the model; README.md says how the tasks were chosen.
"""

from pathlib import Path

from seedbed.common.embedded.tasks import TASKS, EmbeddedTask, examples, write_task

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Configuration, weights and tokenizer, for `from_pretrained`."""

__all__ = ["MODEL_DIR", "TASKS", "EmbeddedTask", "examples", "write_task"]
