"""`razor`: the first tokens, the recent ones, and one key and value that stand for all between (RazorAttention, arXiv
2407.15891, for the heads that retrieve nothing).

The mean of the keys and the mean of the values stand for n freed tokens, with ln n added to the logit. Prompts are read
whole, so a page is freed only in decode. The paper's window is a constant, or a share of the
prompt; here the share follows the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lamina_workers.policies.policy import LONGEST, Policy


@dataclass(frozen=True)
class Razor(Policy):
    """Kept are the `sink` first tokens and the last max(`recent`, `share` of the context)."""

    name: ClassVar[str] = "razor"
    compensated: ClassVar[bool] = True
    sink: int = 64
    recent: int = 256
    share: float = 0.2

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)
        self.check("share", 0, 1)

    @property
    def sinks(self) -> int:
        return self.sink

    def kept_from(self, start: int) -> int:
        return max(0, start - max(self.recent, int(self.share * start)) + 1)
