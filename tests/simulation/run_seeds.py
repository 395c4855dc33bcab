"""Runs fresh scenarios on all cores for some minutes, and shows each failure as a small scenario that replays alone.

    scripts/test --simulation [MINUTES] [--seed N]

Every process runs scenarios one after the other; what they count comes back over a pipe. The first seed is drawn from
the system unless it is given, and printed. The status is 1 where anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

SEEDS = 1 << 40  # the first seed is below
_STUCK = 120.0  # seconds of a core for one scenario, after which its process ends with a traceback
_REPORT = 1.0  # seconds between two reports of a process
_SHOWN = 5  # failures that are made small; of the others only the seeds are shown
_SHRINK = 120.0  # seconds for making one failure small
_TRY = 30.0  # seconds of a core for one try of that: what turns in place is no smaller failure
_ENDED = "a process ended"  # the kind of a failure that may end this process too
_PROGRESS = 15.0  # seconds between two lines


class Failure(NamedTuple):
    """A seed whose scenario has violations: the kind of the first, and what each says."""

    seed: int
    kind: str
    texts: tuple[str, ...]


class Report(NamedTuple):
    """What a process has done since its last report; `seed` is what it runs now."""

    seed: int
    counts: Counter[str]
    failures: tuple[Failure, ...]


def say(text: str) -> None:
    """A line for whoever waits for the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class StuckError(BaseException):
    """A scenario took too long. Nothing of what runs catches it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise StuckError in what takes more seconds of this core."""

    def stuck(*_: object) -> None:
        raise StuckError

    before = signal.signal(signal.SIGPROF, stuck)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(seed: int, scenario: Any = None) -> tuple[Counter[str], Failure | None]:
    """Run the scenario of a seed, or another one in its place. An exception is a failure too."""
    from generated import of_seed
    from oracle import violations
    from scenario import fault_events, run

    scenario = of_seed(seed) if scenario is None else scenario
    try:
        outcome = run(scenario)
    except Exception as error:  # noqa: BLE001  # whatever it is, the seed is shown
        return Counter(), Failure(seed, f"{type(error).__name__} of the run", (f"{type(error).__name__}: {error}",))
    found = violations(scenario, outcome)
    counts = outcome.counts + Counter(scenarios=1, milliseconds=int(outcome.seconds * 1000))
    counts["fault events"] = fault_events(outcome.counts)
    failure = Failure(seed, found[0].kind, tuple(each.text for each in found)) if found else None
    return counts, failure


def work(first: int, step: int, pipe: Connection) -> None:
    """Run the scenarios of seeds `first`, `first + step` and so on until the other end of the pipe is gone."""
    import torch
    from virtual_time import ignore_killed

    def stuck(*_: object) -> None:
        faulthandler.dump_traceback()
        os._exit(3)

    signal.signal(signal.SIGPROF, stuck)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    torch.set_num_threads(1)
    logging.getLogger("lamina").setLevel(logging.CRITICAL)
    ignore_killed()
    counts, failures, seed = Counter[str](), list[Failure](), first
    reported = 0.0
    while True:
        if time.monotonic() - reported > _REPORT or failures:
            try:
                pipe.send(Report(seed, counts, tuple(failures)))
            except OSError:
                return
            counts, failures, reported = Counter(), [], time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, _STUCK)
        counted, failure = check(seed)
        signal.setitimer(signal.ITIMER_PROF, 0)
        counts += counted
        failures += [failure] if failure is not None else []
        seed += step


def deaths_an_hour(counts: Counter[str], seconds: float) -> float:
    """Of simulated processes."""
    return counts["deaths"] / max(seconds, 1e-9) * 3600


class Campaign:
    """Some processes, and what they have found so far."""

    def __init__(self, first: int, processes: int) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self._context = multiprocessing.get_context("spawn")
        self._children: dict[Connection, Any] = {}
        self._last: dict[Connection, int] = {}
        for number in range(processes):
            self._start(first + number, processes)
        self._step = processes

    def _start(self, first: int, step: int) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        child = self._context.Process(target=work, args=(first, step, theirs), daemon=True)
        child.start()
        theirs.close()
        self._children[ours], self._last[ours] = child, first

    def run(self, seconds: float) -> float:
        """Let them run so long, or until Ctrl-C, and say each while what was counted. Returns the seconds that it
        took."""
        began = said = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            while (left := began + seconds - time.monotonic()) > 0:
                for ready in wait(list(self._children), timeout=min(left, 1.0)):
                    self._read(ready)  # type: ignore[arg-type]  # only connections are waited for
                if time.monotonic() - said > _PROGRESS:
                    said = time.monotonic()
                    say(self._line(said - began))
        took = time.monotonic() - began
        for pipe, child in self._children.items():
            pipe.close()
            child.terminate()
            child.join()
        return took

    def _read(self, pipe: Connection) -> None:
        try:
            report: Report = pipe.recv()
        except EOFError:
            child = self._children.pop(pipe)
            child.join()
            last = self._last.pop(pipe)
            why = f"the process of this seed, or of one in the second after, ended with status {child.exitcode}"
            self.failures.append(Failure(last, _ENDED, (why,)))
            self._start(last + 1000 * self._step, self._step)
            return
        self._last[pipe] = report.seed
        self.counts += report.counts
        for failure in report.failures:
            self.failures.append(failure)
            say(f"seed {failure.seed}: {failure.texts[0]}")

    def _line(self, seconds: float) -> str:
        c = self.counts
        return (
            f"{seconds:5.0f} s: {c['scenarios']:,} scenarios, {c['fault events']:,} fault events, "
            f"{c['deaths']:,} deaths ({deaths_an_hour(c, seconds):,.0f} an hour), {c['steps']:,} steps, "
            f"{len(self.failures)} failures"
        )


def shown(value: Any, indent: str = "") -> str:
    """A scenario as Python, without what is a default."""
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        inner = indent + "    "
        return "(\n" + "".join(f"{inner}{shown(each, inner)},\n" for each in value) + f"{indent})"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    given = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if own != default:
            given.append(f"{field.name}={shown(own, indent)}")
    return f"{type(value).__name__}({', '.join(given)})"


def show_failure(failure: Failure, whole: bool = False) -> None:
    """Make a failure small, and print it so that it can be run again."""
    from generated import of_seed
    from scenario import run
    from shrinking import shrunk

    say(f"\nseed {failure.seed}: {failure.kind}")
    for text in failure.texts[:8]:
        say(f"    {text}")

    def fails(scenario: Any) -> bool:
        try:
            with limited(_TRY):
                _, found = check(failure.seed, scenario)
        except StuckError:
            return False
        return found is not None and found.kind == failure.kind

    if failure.kind == _ENDED:
        say(f"replay: scripts/test --simulation --seed {failure.seed}")
        return
    small = of_seed(failure.seed)
    if not fails(small):
        say("    it does not fail again: something in it is not deterministic, or it needs what ran before")
        return
    if not whole:
        small = shrunk(small, fails, seconds=_SHRINK)
    say(f"replay: scripts/test --simulation --seed {failure.seed}\nsmall:\n{shown(small)}")
    try:
        say("\n".join(run(small).log[-60:]))
    except Exception as error:  # noqa: BLE001  # it is the failure
        say(f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="scripts/test --simulation", description=__doc__.split("\n")[0])
    parser.add_argument("minutes", type=float, nargs="?", default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, help="run this seed alone, and make it small where it fails")
    parser.add_argument("--first", type=int, help="begin with this seed instead of a fresh one")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    asked = parser.parse_args(arguments)
    logging.getLogger("lamina").setLevel(logging.CRITICAL)
    if asked.seed is not None:
        return _one(asked.seed)
    first = secrets.randbelow(SEEDS) if asked.first is None else asked.first
    say(f"simulating for {asked.minutes:g} minutes in {asked.processes} processes from seed {first} on")
    campaign = Campaign(first, asked.processes)
    took = campaign.run(asked.minutes * 60)
    _summary(campaign.counts, took)
    kinds: dict[str, list[Failure]] = {}
    for failure in campaign.failures:
        kinds.setdefault(failure.kind, []).append(failure)
    for kind, those in list(kinds.items())[:_SHOWN]:
        say(f"\n{len(those)} times: {kind}: seeds {', '.join(str(each.seed) for each in those[:10])}")
        show_failure(those[0])
    say(f"\n{len(campaign.failures)} failures of {len(kinds)} kinds")
    return 1 if campaign.failures else 0


def _one(seed: int) -> int:
    from generated import of_seed

    counts, failure = check(seed)
    say(shown(of_seed(seed)))
    _summary(counts, 0.0)
    if failure is None:
        say(f"seed {seed}: nothing found")
        return 0
    show_failure(failure)
    return 1


def _summary(counts: Counter[str], seconds: float) -> None:
    counts = Counter(counts)
    virtual = counts.pop("milliseconds", 0) / 1000
    rate = f", {deaths_an_hour(counts, seconds):,.0f} deaths an hour" if seconds else ""
    say(f"{counts['scenarios']:,} scenarios, {virtual:,.0f} s of virtual time in {seconds:,.0f} s{rate}")
    for name, count in counts.most_common():
        say(f"{count:12,} {name}")


if __name__ == "__main__":
    sys.exit(main())
