"""The picture of `kernels.py plot`: the share of the read bandwidth over context, batch and raggedness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

try:
    from matplotlib import pyplot
except ImportError:
    raise SystemExit("plot needs matplotlib: pip install matplotlib") from None

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "internals" / "kernels.png"
# Colours of Okabe and Ito: distinct also for colour-blind readers; the markers are distinct in print.
STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "-"), ("#009E73", "^", "-"), ("#000000", "D", "--"))


def draw(panels: Mapping[tuple[str, str], Mapping[float, tuple[float, float]]], where: str) -> None:
    """Draw what was measured `where`: by the label of a panel and the title of a curve, at each x, the share and the
    bandwidth beside it in GB/s. Marks are hollow where memory was much faster than at its slowest, as shared machines
    do."""
    slow = min(bandwidth for points in panels.values() for _, bandwidth in points.values())
    labels, titles = (list(dict.fromkeys(key[i] for key in panels)) for i in range(2))
    figure, axes = pyplot.subplots(1, len(labels), figsize=(15, 5), sharey=True, layout="constrained")
    for (label, title), points in panels.items():
        axis, (colour, marker, line) = axes[labels.index(label)], STYLES[titles.index(title)]
        shares = [share for share, _ in points.values()]
        axis.plot(list(points), shares, color=colour, linestyle=line, linewidth=0.8, alpha=0.6)
        inside = ["white" if bandwidth > 1.3 * slow else colour for _, bandwidth in points.values()]
        axis.scatter(list(points), shares, marker=marker, edgecolors=colour, facecolors=inside, zorder=3)
        axis.scatter([], [], marker=marker, color=colour, label=title)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        if min(points) >= 1:
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(points), [f"{x // 1024}K" if x >= 1024 else str(x) for x in points])
    axes[0].set_ylim(0, 1.05)
    axes[0].set_ylabel("KV read, share of the read bandwidth")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(titles))
    figure.suptitle(
        f"Decode attention, 8 KV heads, group 4, head size 128: {where}. "
        f"Hollow: memory gave more than {1.3 * slow:.0f} GB/s (lowest {slow:.0f})"
    )
    figure.savefig(PICTURE, dpi=110)
    print(f"drawn into {PICTURE}")
