#!/usr/bin/env python3
"""What plans promise for a trace beside what a server here measures, without and with attention workers.

usage: scripts/simulate/served.py --calibration this-machine.toml [--model smollm2-135m] [--workers 0 1 2]
                                  [--minutes 10] [--rate 0.4] [--trace azure-conv] [--trace-dir DIR] [--out DIR]

The plans are of the calibrated machine, whose cores all attention workers share; each is served by `lamina serve` and
measured as `lamina plan --check` does it. In the end stands what was asked: tokens/s within 5 %, medians of TTFT and
TPOT within 8 %, 99th percentiles within 15 %, and intervals that hold in 85 % of the cells. --out keeps the plans and
the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from lamina.cli.simulator_output import print_check
from lamina.cli.terminal import ProgressBars
from lamina.errors import LaminaError
from lamina.measure.bench.plan_check import Check, check
from lamina.measure.hardware.hardware_calibration import BYTES, NAME
from lamina.models.resolve import resolve
from lamina.simulator.costs import hardware
from lamina.simulator.costs.hardware import Catalogue
from lamina.simulator.costs.model_configs import from_folder
from lamina.simulator.costs.systems import Colocated, Offloaded, System
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning import plan_file
from lamina.simulator.planning.deployment import engine_keywords
from lamina.simulator.planning.plan_file import Plan, Prediction, TraceSummary
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.catalogue import trace as trace_of
from lamina.simulator.traces.demand import demand
from lamina.system.machine import native_dtype, this_machine

LINK = "local-channel"
SLO = Slo(ttft=5.0, tpot=0.2)
ASKED = {"p50": 0.08, "p99": 0.15, "output": 0.05}
"""By the end of a figure's name, how far a promise may be off."""
HELD = 0.85


def system_of(workers: int, known: Catalogue, model: str) -> System:
    """The machine by itself, or with so many attention workers on its own cores."""
    shape = replace(from_folder(resolve(model)), element=BYTES[native_dtype(this_machine())[0]])
    device = known.device(NAME)
    if not workers:
        return Colocated(model=shape, device=device, kv_element=shape.element)
    return Offloaded(
        model=shape,
        model_device=device,
        attention_device=device,
        link=known.link(LINK),
        overlap=False,
        workers=workers,
        kv_element=shape.element,
    )


def plan_of(system: System, model: str, trace: Trace, rate: float) -> Plan:
    """The plan file's content for that system, without a prediction: `check` makes it, for what it sends."""
    asked = demand(trace).at_rate(rate)
    summary = TraceSummary(asked.name, asked.requests, asked.rate, asked.prompt, asked.output, asked.context)
    promised = Prediction("none: the check promises", rate, rate * asked.output, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    return Plan(model, system, promised, summary, SLO, engine=engine_keywords(system, 8192))


def missed(found: Check) -> list[str]:
    """The figures that are further off than was asked."""
    return [
        f"{each.name} {each.difference:+.1%}"
        for each in found.figures
        if abs(each.difference) > next((most for end, most in ASKED.items() if each.name.endswith(end)), 1.0)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="what `lamina calibrate-hardware` wrote")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=0.4, help="requests a second")
    parser.add_argument("--trace", default="azure-conv")
    parser.add_argument("--trace-dir", type=Path)
    parser.add_argument("--out", type=Path, help="a folder for plans and figures")
    args = parser.parse_args()
    known, trace = hardware.load(args.calibration), trace_of(args.trace, folder=args.trace_dir)
    checks: dict[int, Check] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for workers in args.workers:
            path = folder / f"plan-{workers}.toml"
            plan_file.write(path, plan_of(system_of(workers, known, args.model), args.model, trace, args.rate))
            with ProgressBars() as progress:
                checks[workers] = check(path, trace, minutes=args.minutes, progress=progress)
            print(f"\n{workers} attention workers")
            print_check(checks[workers])
            if args.out is not None:
                (folder / f"check-{workers}.json").write_text(json.dumps(asdict(checks[workers]), indent=1) + "\n")
    print()
    cells = [each for found in checks.values() for each in found.figures if each.unit != "$"]
    for workers, found in checks.items():
        off = missed(found)
        print(f"{workers} attention workers: {', '.join(off) + ' missed' if off else 'all met'}")
    held = sum(each.holds for each in cells)
    print(f"intervals hold in {held} of {len(cells)} cells (asked {HELD:.0%})")


if __name__ == "__main__":
    try:
        main()
    except LaminaError as error:
        raise SystemExit(f"error: {error}") from error
