"""What vLLM loads in each of its processes (entry point group `vllm.general_plugins`). It loads nothing itself."""

from __future__ import annotations

import os

from lamina.behind import SWITCH


def register() -> None:
    """Have Lamina's attention workers attend, where the environment names some. May be called again."""
    if os.environ.get(SWITCH):
        from lamina.behind.vllm_backend import install

        install()
