"""`full`: every query sees every key. The exact answer, and the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lamina_workers.policies.policy import Policy


@dataclass(frozen=True)
class Full(Policy):
    name: ClassVar[str] = "full"
