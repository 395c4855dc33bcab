"""Pictures of simulated runs: written whatever names say; without matplotlib an error says what to install."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from simulated_runs import candidates, five, plan, run

from lamina.errors import InvalidRequest
from lamina.simulator.event_loop.results import Distribution
from lamina.simulator.reports.plots import save_comparison, save_pareto, save_timeline

pytest.importorskip("matplotlib", reason="matplotlib is of the extra plots")


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_comparison(tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    save_comparison(five(), path)
    assert size(path)[0] > 1200
    again = tmp_path / "again.png"
    save_comparison(five(), again)
    assert path.read_bytes() == again.read_bytes()


def test_comparison_of_what_is_not_known(tmp_path: Path) -> None:
    nothing = Distribution(0.0, 0.0, 0.0, 0.0)
    path = tmp_path / "comparison.png"
    save_comparison([run(0, ttft=nothing, tpot=nothing, tbt=nothing, goodput=0.0, price=0.0)], path)
    size(path)


def test_timeline(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    save_timeline(run(3, system="$a$ {b} \\frac"), path)
    size(path)


def test_a_timeline_of_one_step(tmp_path: Path) -> None:
    save_timeline(run(3, samples=1), tmp_path / "timeline.png")
    size(tmp_path / "timeline.png")


def test_pareto(tmp_path: Path) -> None:
    path = tmp_path / "pareto.png"
    save_pareto(candidates(), str(plan()["chosen"]), path)
    size(path)
    save_pareto([("$none$ feasible", 1.0, 2.0, False)], "another", path)
    size(path)


def test_nothing_to_draw(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    with pytest.raises(InvalidRequest, match="no results"):
        save_comparison([], path)
    with pytest.raises(InvalidRequest, match="no samples"):
        save_timeline(run(samples=0), path)
    with pytest.raises(InvalidRequest, match="no points"):
        save_pareto([], "", path)
    assert not path.exists()


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written"):
        save_pareto(candidates(), "", tmp_path / "absent" / "picture.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidRequest, match="pip install matplotlib"):
        save_timeline(run(), tmp_path / "picture.png")
