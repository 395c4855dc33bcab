#!/usr/bin/env python3
"""What clients of `lamina serve` notice when something fails, as a table:

    scripts/evaluate/faults.py                                all scenarios, in about a quarter of an hour
    scripts/evaluate/faults.py --only "worker killed"         some of them
    scripts/evaluate/faults.py --out faults/                  the table as Markdown, all figures as JSON; rows of
                                                              other scenarios stay there

Each scenario starts a server and attention workers as processes of this host, lets clients stream completions, has
something fail, waits until the service is whole again and every stream goes on, and lets them stream on. Its checks
then say what does not hold: requests that were lost, texts that differ from those of an undisturbed engine, a service
that does not recover, or keeps what it should free. The exit status is 1 where one does not hold.

The columns: "start" is how long the server took to serve. "answered" counts requests that got all their tokens;
"refused", that got HTTP 503 or no connection, and were sent again; "lost", that broke off or ended with an error, and
"tokens lost" are those that they still lacked. TTFT and TPOT are medians in milliseconds, of the requests that ended
before the failure and of those sent after the recovery. "pause" is the longest time between two tokens of one stream
since the failure, "recovery" the time from the failure until the service has all its parts and each client has had a
token since, in seconds. "computed again" counts tokens whose KV was lost. Below the table is what does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fault_injection.catalogue import SCENARIOS
from fault_injection.load import Load
from fault_injection.result import NOTHING, Row, row
from fault_injection.scenario import Scenario, run
from fault_injection.table import table
from fault_injection.world import path_to

from lamina import LLM
from lamina.system.machine import this_machine


class UndisturbedTexts:
    """The texts of an engine without workers in this process, which nothing happens to. A context manager."""

    def __init__(self, model: str) -> None:
        self._llm = LLM(model, threads=1, weights="float32", kv_memory="256MiB")
        self._known: dict[tuple[Load, int], str] = {}

    def __enter__(self) -> UndisturbedTexts:
        return self

    def __exit__(self, *_: object) -> None:
        self._llm.close()

    def __call__(self, load: Load, prompts: set[int]) -> dict[int, str]:
        unknown = sorted(number for number in prompts if (load, number) not in self._known)
        if unknown:
            completions = self._llm.generate(
                [load.prompt(number) for number in unknown], max_tokens=load.tokens, temperature=0, ignore_eos=True
            )
            self._known |= {(load, number): each.text for number, each in zip(unknown, completions, strict=True)}
        return {number: self._known[load, number] for number in prompts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.name for each in SCENARIOS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--previous", type=Path, help="the repository of the previous version, for a rolling upgrade")
    parser.add_argument("--seconds", type=float, default=8.0, help="of streaming before a failure, and after recovery")
    parser.add_argument("--out", type=Path, help="a folder for faults.md and faults.json")
    args = parser.parse_args()
    chosen = [each for each in SCENARIOS if args.only is None or each.name in args.only]
    if args.previous is None and (left_out := [each.name for each in chosen if each.setup.previous]):
        print(f"left out, for want of --previous: {', '.join(left_out)}", file=sys.stderr)
        chosen = [each for each in chosen if not each.setup.previous]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends with this program
    if args.previous is not None:
        compile_kernels(args.previous, args.model)
    rows = []
    with UndisturbedTexts(args.model) as texts:
        for scenario in chosen:
            rows.append(one(scenario, args, texts))
            print(table(rows[-1:], header=len(rows) == 1), flush=True)
            if args.out is not None:
                write(args.out, args.model, rows)
    if any(row.problems for row in rows):
        raise SystemExit(1)


def compile_kernels(source: Path, model: str) -> None:
    """Have the previous version compile its kernels, so that no engine waits for that."""
    command = [sys.executable, "-m", "lamina", "generate", "a", "--model", model, "--max-tokens", "1", "--threads", "1"]
    command += ["--weights", "float32", "--kv-memory", "64MiB"]
    subprocess.run(command, check=True, capture_output=True, cwd=source, env=os.environ | path_to(source))


def one(scenario: Scenario, args: argparse.Namespace, texts: UndisturbedTexts) -> Row:
    """The row of a scenario; where it could not be run, one that says so."""
    try:
        with tempfile.TemporaryDirectory(prefix="lamina-faults-") as folder:
            result = run(scenario, args.model, Path(folder), texts, args.previous, args.seconds)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return row(scenario.name, scenario.failure, NOTHING, scenario.load.tokens, [f"could not be run: {error}"])
    problems = filter(None, (check.problem(result) for check in scenario.checks))
    return row(scenario.name, scenario.failure, result, scenario.load.tokens, problems)


def write(folder: Path, model: str, rows: Iterable[Row]) -> None:
    """Rows take the place of those of an earlier run there."""
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Row] = {}
    if (folder / "faults.json").exists():
        earlier = json.loads((folder / "faults.json").read_text())["scenarios"]
        known = {each["scenario"]: Row(**each) for each in earlier}
    known |= {each.scenario: each for each in rows}
    rows = [known[each.name] for each in SCENARIOS if each.name in known]
    (folder / "faults.md").write_text(table(rows) + "\n")
    machine = this_machine()
    figures = {
        "machine": machine.processor,
        "cores": machine.cores,
        "model": model,
        "scenarios": [dataclasses.asdict(each) for each in rows],
    }
    (folder / "faults.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
