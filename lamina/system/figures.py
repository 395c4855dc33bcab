"""The style of pictures, and how one is written to a file: by matplotlib (the extra `plots`), imported when needed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_PLOTS = "pictures need matplotlib; install it with: pip install matplotlib"
BEST, BAR, SOFT, RULE = "#0065a3", "#8fb8d4", "#59616b", "#dcdfe3"
ACCENT, THIRD = "#b04a00", "#00705a"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "text.parse_math": False,  # names come from files, and may hold dollars
}


def needs_matplotlib() -> None:
    """Raises InvalidRequest where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(NO_PLOTS) from error


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` by `height` inches, written to `path` as PNG when the block ends. Raises InvalidRequest
    without matplotlib, or for a path that cannot be written."""
    needs_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        image = io.BytesIO()
        drawn.savefig(image, format="png", dpi=130, metadata={"Software": "lamina"})
    try:
        Path(path).write_bytes(image.getvalue())
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error}") from error
