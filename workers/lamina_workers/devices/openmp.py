"""What OpenMP reads from the environment, once, when torch is imported. Importing this file imports no torch.

Where engine and attention workers share few cores, idle OpenMP threads of one must not spin on a core that the other
needs. libgomp's default spins for milliseconds; not spinning at all makes each parallel operation wait for the
system. Measured for SmolLM2 8x1024 on two cores: one process 26 ms a step, two with 3000 spins 49, with 1000 spins 42.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

SPIN_COUNT = "1000"
SPIN_COUNT_BESIDE_CLIENTS = "10000"
"""Where a server's clients want the cores, a few times a step, and not attention workers in every layer."""
FEW_CORES = 8


def share_cores(
    spin_count: str = SPIN_COUNT, environment: MutableMapping[str, str] = os.environ, cores: int | None = None
) -> bool:
    """Ask for short spinning where there are few cores, unless the environment says something. False: torch is imported
    already, so it is too late for this process."""
    if (cores or os.cpu_count() or 1) > FEW_CORES or "GOMP_SPINCOUNT" in environment:
        return True
    environment["GOMP_SPINCOUNT"] = spin_count
    return "torch" not in sys.modules
