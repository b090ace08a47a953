"""One example of a task, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A text to learn or a question to answer.

    In the shape prompt/choices/label, `choices` holds at least two answers and `label` is the index of the right one; in the
    shape prompt/completion, `choices` holds the one completion and `label` is 0; in the shape text, `prompt` is empty.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int = 0
    instruction: str = ""

    @property
    def completion(self) -> str:
        """The text that training should make likely."""
        return self.choices[self.label]

    def context(self, template: str) -> str:
        """What the model reads before the completion; empty where there is no prompt."""
        if not self.prompt:
            return ""
        # Not str.format: prompts and templates may hold braces of their own.
        return template.replace("{instruction}", self.instruction).replace("{prompt}", self.prompt)

    def continuation(self, choice: str) -> str:
        """A choice as it follows the context: after one space, unless there is no context."""
        return f" {choice}" if self.prompt else choice
