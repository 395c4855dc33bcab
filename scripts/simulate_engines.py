#!/usr/bin/env python3
"""How far off the numbers of one engine are for another: a plan's intervals have to hold that, since Lamina's own
engine is not among those that were measured.

usage: scripts/simulate_engines.py [--cells FILE]

For each kind of model, first every engine's numbers on the cells of the others. Then each engine is left out in turn,
and predicted by the one of the rest whose numbers miss the rest's own cells least (TTFT at 0.4 of TPOT's weight, as in
fitting). The factors of `engine` in lamina/simulator/costs/uncertainty.toml are what 5 and 95 % of these predictions of
the fitted half missed, each engine of equal weight, and wider by sqrt(1 + 1 / 3) in logarithms, as the engine that is
planned is one more than three. They are tried on the half that is held out. "Strictly": the factors, too, are from the
two engines of the rest alone. Last, pairs of cells that differ in one thing, beside `RATIO_ERROR`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean

from simulate.gpu_cells import CELLS, KINDS, Cell, Predicted, error, middle, predict, read, weighted_quantile

from lamina.simulator.costs.hardware import Catalogue, load
from lamina.simulator.costs.uncertainty import RATIO_ERROR, Factors

NUMBERS = ("tpot", "ttft", "goodput")
_TTFT = 0.4


@dataclass(frozen=True)
class Engines:
    """The cells of one kind of model, predicted by every engine's numbers."""

    kind: str
    cells: tuple[Cell, ...]
    catalogue: Catalogue

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.engine for cell in self.cells))

    @cached_property
    def predicted(self) -> dict[tuple[str, str], list[Predicted]]:
        """By whose numbers, and whose cells."""
        cells = [cell for cell in self.cells if cell.kind == self.kind]
        return {
            (by, of): [predict(cell, self.catalogue, self.catalogue.engines[by]) for cell in cells if cell.engine == of]
            for by in self.names
            for of in self.names
        }

    def of(self, by: str, of: str, held_out: bool) -> list[Predicted]:
        return [entry for entry in self.predicted[by, of] if entry.cell.held_out == held_out]

    def best(self, engines: Sequence[str]) -> str:
        """The engine whose numbers miss the others' cells least, of the half that was fitted to."""

        def missed(by: str) -> float:
            others = [self.of(by, of, False) for of in engines if of != by]
            return fmean(error(other, "tpot") + _TTFT * error(other, "ttft") for other in others)

        return min(engines, key=missed)

    def left_out(self, held_out: bool) -> dict[str, list[Predicted]]:
        """The cells of each engine, by the best of the other engines."""
        rest = {of: [name for name in self.names if name != of] for of in self.names}
        return {of: self.of(self.best(others), of, held_out) for of, others in rest.items()}

    def without(self, engine: str) -> dict[str, list[Predicted]]:
        """The cells of each of the other engines, by the other one of them."""
        one, other = (name for name in self.names if name != engine)
        return {one: self.of(other, one, False), other: self.of(one, other, False)}


def factors(missed: dict[str, list[Predicted]], what: str) -> Factors:
    """Around a number that is predicted for one more engine: see above."""
    values = [(-math.log(entry.ratio(what)), 1 / len(entries)) for entries in missed.values() for entry in entries]
    wider = math.sqrt(1 + 1 / len(missed))
    low, high = (weighted_quantile(values, share) * wider for share in (0.05, 0.95))
    return round(math.exp(min(0.0, low)), 2), round(math.exp(max(0.0, high)), 2)


def holds(entries: Sequence[Predicted], what: str, within: Factors) -> float:
    """The share of cells whose measured number lies between these factors times the predicted one."""
    low, high = within
    return fmean(low <= 1 / entry.ratio(what) <= high for entry in entries)


@dataclass(frozen=True, slots=True)
class Held:
    """How often intervals hold on the cells held out: by factors of all engines, and of the others alone."""

    within: Factors
    cells: int
    by_engine: dict[str, float]
    share: float
    strictly: float


def held(engines: Engines, what: str) -> Held:
    within, tried = factors(engines.left_out(False), what), engines.left_out(True)
    cells = [entry for entries in tried.values() for entry in entries]
    strictly = sum(
        len(entries) * holds(entries, what, factors(engines.without(name), what)) for name, entries in tried.items()
    )
    by_engine = {name: holds(entries, what, within) for name, entries in tried.items()}
    return Held(within, len(cells), by_engine, holds(cells, what, within), strictly / len(cells))


def pairs(cells: Sequence[Cell], catalogue: Catalogue, varied: str) -> Iterator[float]:
    """How many times off the predicted ratio of tokens/s a device is, of pairs of cells that differ in `varied` alone:
    the larger over the smaller."""
    alike: dict[Cell, list[Cell]] = {}
    for cell in cells:
        key = replace(cell, number=0, ttft=0.0, tpot=0.0, **{varied: type(getattr(cell, varied))()})
        alike.setdefault(key, []).append(cell)
    for group in alike.values():
        for one, other in combinations(group, 2):
            if getattr(one, varied) != getattr(other, varied):
                off = predict(one, catalogue).ratio("goodput") / predict(other, catalogue).ratio("goodput")
                yield max(off, 1 / off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=CELLS)
    args = parser.parse_args()
    if not args.cells.is_file():
        parser.error(f"there is no file {args.cells}; name one by --cells")
    catalogue, cells = load(), read(args.cells)
    for kind in KINDS:
        engines = Engines(kind, tuple(cells), catalogue)
        print(f"{kind}: by {engines.best(engines.names)} unless that is left out")
        for (by, of), entries in engines.predicted.items():
            if by != of:
                shown = (
                    f"{what.upper()} {middle(entries, what):.2f} {error(entries, what):.0%}" for what in NUMBERS[:2]
                )
                print(f"  {by} for {of}, {len(entries)} cells:", ", ".join(shown))
        for what in NUMBERS:
            tried = held(engines, what)
            each = ", ".join(f"{name} {share:.0%}" for name, share in tried.by_engine.items())
            print(
                f"  {what} {list(tried.within)}: holds {tried.share:.0%} of {tried.cells} held out ({each}), strictly "
                f"{tried.strictly:.0%}"
            )
    print("\npairs of cells, tokens/s a device: the predicted ratio is off by")
    for varied in ("devices", "device"):
        for kind in KINDS:
            off = sorted(pairs([cell for cell in cells if cell.kind == kind], catalogue, varied))
            if off:
                median, most = (weighted_quantile(((value, 1.0) for value in off), share) - 1 for share in (0.5, 0.9))
                within = fmean(value <= 1 + RATIO_ERROR[kind] for value in off)
                print(
                    f"  {kind}, {varied}: half {median:.1%}, 90 % {most:.0%}; within {RATIO_ERROR[kind]:.0%}: "
                    f"{within:.0%} of {len(off)}"
                )


if __name__ == "__main__":
    main()
