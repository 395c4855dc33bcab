"""How progress is reported: by a call."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""What is being done, how many bytes of it are done, and how many there are (None: unknown)."""
