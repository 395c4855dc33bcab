"""The commands around the simulator: plan a deployment, compare systems on a trace, measure this machine for both.

The `parse_` functions read the words of these commands: limits, rates, policies, drafts, failures. All raise
InvalidRequest. `lamina.simulator` is imported when a command runs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.options import check_output, flatten_options, make_folder
from lamina.cli.simulator_output import (
    header,
    plan_page,
    plan_record,
    print_check,
    print_plan,
    print_runs,
    print_weighed,
    weighed_record,
    write_runs,
)
from lamina.cli.terminal import ProgressBars, print_json
from lamina.errors import InvalidRequest
from lamina.system.machine import on_all_cores
from lamina.system.text_files import write_text

if TYPE_CHECKING:
    from lamina.measure.hardware import Calibration
    from lamina.simulator.costs.cost_model import KvPolicy, Speculation
    from lamina.simulator.costs.shapes import ModelShape
    from lamina.simulator.event_loop.failures import Failures
    from lamina.simulator.event_loop.simulate import Slo
    from lamina.simulator.planning.inventory import Inventory
    from lamina.simulator.planning.plan import PlanRequest
    from lamina.simulator.traces.arrivals import Trace

DEFAULT_SLO = "tpot=100ms,ttft=2s"
_SLO = re.compile(r"(ttft|tpot)=(\d{1,9}(?:\.\d{1,9})?)(us|ms|s)", re.ASCII)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_slo(words: str) -> Slo:
    """Such as "tpot=100ms,ttft=2s", each at most once; "none" for any time. Raises InvalidRequest."""
    from lamina.simulator.event_loop.simulate import Slo

    seconds: dict[str, float] = {}
    for word in [] if words.strip() == "none" else words.split(","):
        match = _SLO.fullmatch(word.strip())
        if match is None or match[1] in seconds or not float(match[2]):
            raise InvalidRequest(
                f"slo is {words!r:.80}; allowed are ttft and tpot, once each, above 0, with us, ms or s, such as "
                f'"{DEFAULT_SLO}", or "none"'
            )
        seconds[match[1]] = float(match[2]) * _UNITS[match[3]]
    return Slo(**seconds)


def parse_rate(words: str) -> float | None:
    """Requests a second: None for "trace", infinite for "max". Raises InvalidRequest."""
    if words in ("trace", "max"):
        return None if words == "trace" else math.inf
    try:
        value = float(words)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e6:  # NaN compares false
        raise InvalidRequest(f"rate is {words!r:.80}; allowed are trace, max, or requests a second up to 1e6")
    return value


def parse_policy(words: str | None) -> KvPolicy:
    """The policy in words such as "auto=0.31,1": its name, and the shares of the KV read and held. None: everything is
    read and held. Raises InvalidRequest."""
    from lamina.simulator.costs.cost_model import FULL, KvPolicy

    if words is None:
        return FULL
    name, _, shares = words.rpartition("=")
    try:
        if not name:
            raise ValueError("it has no name")
        read_share, held_share = (float(share) for share in shares.split(","))
    except ValueError as error:
        raise InvalidRequest(f"policy is {words!r:.80}; allowed is NAME=READ,HELD, such as auto=0.31,1") from error
    return KvPolicy(name, read_share, held_share)


def parse_speculation(asked: PlanOptions | SimulateOptions) -> Speculation | None:
    """What drafts, with its acceptance; None where nothing does. Raises InvalidRequest."""
    from lamina.simulator.costs.cost_model import NGRAM, Speculation
    from lamina.simulator.costs.model_configs import model as shape_of

    name, acceptance = asked.speculate, asked.acceptance
    if name is None:
        if acceptance is not None or asked.proposed != 1:
            raise InvalidRequest("--acceptance or --proposed was given; it needs --speculate")
        return None
    if acceptance is None:
        raise InvalidRequest(
            "--speculate was given; it needs --acceptance, from 0 to 1: of the first drafts of rows, how many were "
            "accepted, as `Completion.stats` or /metrics count them"
        )
    draft = None if name == NGRAM else shape_of(name)
    return Speculation(acceptance, asked.num_speculative_tokens, asked.proposed, name, draft)


def parse_failures(every: float | None, redundancy: str, restart: float) -> Failures | None:
    """Workers that are lost, one of each instance every so many seconds; None where none is. Raises InvalidRequest."""
    from lamina.simulator.event_loop.failures import Failures

    if every is None:
        if redundancy != "none" or restart != 10.0:
            raise InvalidRequest("--redundancy or --worker-restart was given; it needs --lose-worker-every")
        return None
    return Failures(every, redundancy, restart)


DEFAULT_MODEL, DEFAULT_TRACE = "llama-3-70b", "azure-conv"
DEFAULT_SYSTEMS = "chunked,colocated,disaggregated,lamina,lamina-cpu"
DEFAULT_COUNT = 2000

Model = Annotated[str, typer.Option("--model", "-m", help="A model the simulator knows, or a path to a config.json.")]
TraceName = Annotated[
    str, typer.Option("--trace", help="A published trace by name, coding-agents, or a file in a published format.")
]
TraceDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of files of published traces. Azure's are built in; Mooncake's is drawn without its file."
    ),
]
SloText = Annotated[str, typer.Option("--slo", help='Such as "tpot=100ms,ttft=2s"; "none" for any time.')]
Rate = Annotated[str, typer.Option(help="Requests a second: trace (as it has them), max, or a number.")]
Hardware = Annotated[Path | None, typer.Option(help="A TOML file with more devices and links.")]
Prefill = Annotated[bool, typer.Option("--prefill/--no-prefill", help="Prompts are computed here, or elsewhere.")]
EfficiencyName = Annotated[
    str, typer.Option(help="Of devices without measurements: roofline (their best), typical, vllm, sglang or trtllm.")
]
Weights = Annotated[
    str, typer.Option(help="auto, bfloat16, float32, int4, int8, a kind such as q4_k, or bytes a weight such as 0.61.")
]
Speculate = Annotated[str | None, typer.Option(help="What drafts: ngram, or a model the simulator knows.")]
Drafts = Annotated[int, typer.Option("--num-speculative-tokens", help="Drafts of a sequence and step, at most.")]
Acceptance = Annotated[
    float | None,
    typer.Option(help="The chance that a draft is accepted where all before it were; needed by --speculate."),
]
Proposed = Annotated[float, typer.Option(help="For n-grams, the share of steps that have drafts.")]
Seed = Annotated[int, typer.Option(help="For traces that are drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What `lamina plan` plans for, from which devices, and where the plan goes."""

    model: Model = DEFAULT_MODEL
    trace: TraceName = DEFAULT_TRACE
    slo: SloText = DEFAULT_SLO
    budget: Annotated[float | None, typer.Option(help="Dollars an hour at most.")] = None
    inventory: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file of devices, or of calibrate-hardware. Default: 8 each of H100, H200, H20; 4 EPYC hosts."
        ),
    ] = None
    behind: Annotated[
        str | None,
        typer.Option(help="An engine, vllm: does it pay to put attention workers behind it, or does it do alone?"),
    ] = None
    any_system: Annotated[
        bool,
        typer.Option(
            "--any", help="Also systems that no engine here can run, such as prompts computed on other devices."
        ),
    ] = False
    hardware: Hardware = None
    rate: Rate = "trace"
    count: Annotated[
        int | None, typer.Option(help="How many of the trace's requests are taken, from its start. Default: all.")
    ] = None
    trace_dir: TraceDir = None
    prefill: Prefill = True
    efficiency: EfficiencyName = "typical"
    weights: Weights = "auto"
    speculate: Speculate = None
    num_speculative_tokens: Drafts = 8
    acceptance: Acceptance = None
    proposed: Proposed = 1.0
    verify: Annotated[
        bool, typer.Option(help="Let the event loop confirm what is chosen; else formulas are believed.")
    ] = True
    out: Annotated[Path | None, typer.Option(help="Write the winner here, for --plan and --check.")] = None
    html: Annotated[Path | None, typer.Option(help="Write a report here.")] = None
    check: Annotated[
        Path | None, typer.Option(help="Serve this plan here instead, with its trace: promised beside measured.")
    ] = None
    minutes: Annotated[
        float | None, typer.Option(help="How long --check serves. Default: 2, or more where requests are rare.")
    ] = None
    why: Annotated[
        bool, typer.Option("--why", help="Also what would change it: prices, links, load, lengths, SLO, speed.")
    ] = False
    as_json: Json = False
    seed: Seed = 0

    @property
    def reached(self) -> str:
        """Whose efficiency devices without measurements have."""
        return self.behind or self.efficiency

    def devices(self, model: ModelShape) -> Inventory:
        """The inventory, with the efficiency that was asked for."""
        from lamina.simulator.costs import hardware as catalogues
        from lamina.simulator.planning import inventory as inventories

        catalogue = catalogues.load(self.hardware)
        reached = catalogue.efficiency(self.reached, model)
        have = inventories.read(self.inventory, catalogue) if self.inventory else inventories.default(catalogue)
        if self.behind and not self.inventory:
            have = replace(have, links=(catalogue.link("ethernet-100g"),))  # which the plugin speaks over
        if not (self.any_system or self.behind):
            have = inventories.deployable(have)
        return inventories.with_efficiency(have, reached)


@flatten_options
def plan(asked: PlanOptions) -> None:
    """Which mix of machines, and how many of each, gives the most for a dollar within the latency that users accept.

    Ends with 1 where nothing serves all that is asked for."""
    if asked.check is not None:
        _check(asked.check, asked)
        return
    slo, rate = parse_slo(asked.slo), parse_rate(asked.rate)
    _check_behind(asked)
    check_output("out", asked.out, ".toml")
    check_output("html", asked.html, ".html")
    if asked.html is not None and not asked.verify:
        raise InvalidRequest("--html and --no-verify were given; a report needs at least one run")

    from lamina.simulator.costs import hardware as catalogues
    from lamina.simulator.costs.model_configs import model as shape_of
    from lamina.simulator.planning.plan import PlanRequest, make_plan
    from lamina.simulator.planning.plan_file import write

    shape = shape_of(asked.model).with_weights(asked.weights)
    devices = asked.devices(shape)
    trace = _arriving(asked.trace, asked, slo)
    drafts = parse_speculation(asked)
    request = PlanRequest(asked.model, shape, devices, trace, slo, asked.budget, rate, asked.prefill, drafts)
    if asked.behind is not None:
        _weigh(asked, asked.behind, request)
        return
    with ProgressBars(quiet=0) as progress:
        planned = make_plan(
            request, check=asked.verify, seed=asked.seed, why=asked.why, progress=progress, mapped=on_all_cores
        )
    if asked.out is not None:
        write(asked.out, planned.plan)
    if asked.html is not None:
        write_text(asked.html, plan_page(planned, f"A plan for {shape.name} on {trace.name}"))
    if asked.as_json:
        print_json(plan_record(planned))
    else:
        reached = catalogues.load(asked.hardware).said_of(asked.efficiency, shape)
        heading = header(planned.demand, shape.name, asked.slo, asked.efficiency, asked.budget)
        remarks = [f"The trace {trace.name}: {remark}." for remark in trace.remarks]
        if not asked.any_system:
            remarks.append("Not considered: prompts on other devices, which no engine here can run (--any).")
        if not asked.why:
            remarks.append("--why says what would change it.")
        print_plan(planned, heading, reached, asked.prefill, asked.out, remarks)
    if not planned.winner.serves:
        raise typer.Exit(1)


def _check_behind(asked: PlanOptions) -> None:
    """Raise InvalidRequest for an engine that is not known, or options that do not go with one."""
    from lamina.simulator.planning.behind import check_engine

    if asked.behind is None:
        return
    check_engine(asked.behind)
    others = {
        "--out": asked.out,
        "--html": asked.html,
        "--why": asked.why,
        "--any": asked.any_system,
        "--efficiency": asked.efficiency not in ("typical", asked.behind),
    }
    if names := [name for name, value in others.items() if value]:
        raise InvalidRequest(f"--behind and {names[0]} were given; allowed is one of the two")


def _weigh(asked: PlanOptions, engine: str, request: PlanRequest) -> None:
    """An engine with attention workers behind it, beside that engine alone."""
    from lamina.simulator.costs import hardware as catalogues
    from lamina.simulator.planning.behind import weigh

    with ProgressBars(quiet=0) as progress:
        weighed = weigh(request, engine, check=asked.verify, seed=asked.seed, progress=progress, mapped=on_all_cores)
    if asked.as_json:
        print_json(weighed_record(weighed))
    else:
        heading = header(request.demand, request.model.name, asked.slo, engine, asked.budget)
        reached = catalogues.load(asked.hardware).said_of(engine, request.model)
        print_weighed(weighed, heading, reached, asked.prefill)


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What `lamina simulate` compares, on which trace, and how the results are shown."""

    model: Model = DEFAULT_MODEL
    trace: TraceName = DEFAULT_TRACE
    system: Annotated[
        str, typer.Option(help="Systems to compare, with commas; also with devices, such as lamina:h100x2+h20x4.")
    ] = DEFAULT_SYSTEMS
    hardware: Hardware = None
    slo: SloText = DEFAULT_SLO
    rate: Rate = "trace"
    count: Annotated[
        int | None, typer.Option(help="How many of the trace's requests are taken, from its start; 0: all.")
    ] = DEFAULT_COUNT
    trace_dir: TraceDir = None
    link: Annotated[str | None, typer.Option(help="Between tiers. Default: fhbn-400g, to CPU hosts 25G.")] = None
    lanes: Annotated[int, typer.Option(help="Batches in rotation, where attention is elsewhere.")] = 2
    policy: Annotated[
        str | None, typer.Option(help="A KV policy as NAME=READ,HELD: shares of the bytes read and held.")
    ] = None
    prefill: Prefill = True
    users: Annotated[
        int | None, typer.Option(help="So many users take the requests in turn, each after its last one's end.")
    ] = None
    think: Annotated[float, typer.Option(help="Seconds that a user waits before the next request; needs --users.")] = (
        0.0
    )
    lose_worker_every: Annotated[
        float | None, typer.Option(help="Each instance loses a worker every so many seconds.")
    ] = None
    worker_restart: Annotated[float, typer.Option(help="Seconds until a lost worker is replaced.")] = 10.0
    redundancy: Annotated[str, typer.Option(help="Of KV, for workers that are lost: none, replica, parity.")] = "none"
    efficiency: EfficiencyName = "typical"
    weights: Weights = "auto"
    speculate: Speculate = None
    num_speculative_tokens: Drafts = 8
    acceptance: Acceptance = None
    proposed: Proposed = 1.0
    seed: Seed = 0
    as_json: Json = False
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False
    out: Annotated[
        Path | None, typer.Option(help="A folder for the table, JSON, CSV, report and samples of steps.")
    ] = None


@flatten_options
def simulate(asked: SimulateOptions) -> None:
    """Systems beside each other on one trace: throughput, cost, latencies, utilisation."""
    if asked.as_json and asked.as_csv:
        raise InvalidRequest("--json and --csv were given; allowed is one of the two")
    if asked.think and asked.users is None:
        raise InvalidRequest(f"--think {asked.think:g} was given; it needs --users")
    if asked.users is not None and asked.rate != "trace":
        raise InvalidRequest("--users and --rate were given; allowed is one of the two, as users set their own rate")
    slo, rate = parse_slo(asked.slo), parse_rate(asked.rate)
    make_folder("out", asked.out)
    failures = parse_failures(asked.lose_worker_every, asked.redundancy, asked.worker_restart)

    from lamina.simulator.costs import hardware as catalogues
    from lamina.simulator.costs.model_configs import model as shape_of
    from lamina.simulator.planning.comparison import Choice, assumed, build, compare
    from lamina.simulator.planning.reasons import overloads
    from lamina.simulator.reports.report import to_csv, to_json
    from lamina.simulator.traces.arrivals import all_at_once, closed_loop
    from lamina.simulator.traces.catalogue import at_rate
    from lamina.simulator.traces.catalogue import trace as trace_of
    from lamina.simulator.traces.demand import demand

    catalogue = catalogues.load(asked.hardware)
    shape, drafts = shape_of(asked.model).with_weights(asked.weights), parse_speculation(asked)
    available = catalogues.with_efficiency(catalogue, catalogue.efficiency(asked.efficiency, shape))
    choice = Choice(shape, available, parse_policy(asked.policy), asked.lanes, asked.link, drafts)
    systems = [build(name, choice) for name in _names(asked.system)]
    trace = trace_of(asked.trace, asked.count or None, asked.seed, asked.trace_dir)
    if rate is not None:
        trace = all_at_once(trace) if math.isinf(rate) else at_rate(trace, rate)
    if asked.users is not None:
        trace = closed_loop(trace, asked.users, asked.think)
    with ProgressBars(quiet=0) as progress:
        results = compare(
            systems,
            trace,
            slo=slo,
            prefill=asked.prefill,
            seed=asked.seed,
            progress=progress,
            assumptions=assumed(catalogue.said_of(asked.efficiency, shape), asked.prefill, trace, choice),
            failures=failures,
        )
    load = demand(trace)
    remarks = overloads(systems, results, load, slo, asked.prefill)
    if asked.out is not None:
        write_runs(asked.out, results, slo, remarks)
    if asked.as_json or asked.as_csv:
        typer.echo(to_json(results) if asked.as_json else to_csv(results), nl=False)
    else:
        print_runs(results, systems, header(load, shape.name, asked.slo, asked.efficiency), remarks)


def calibrate_hardware(
    model: Annotated[str, typer.Option("--model", "-m", help="Whose shapes the kernels are measured with.")] = (
        "smollm2-135m"
    ),
    out: Annotated[Path, typer.Option(help="Where to write what was measured.")] = Path("this-machine.toml"),
    price: Annotated[float, typer.Option(help="What this machine costs, dollars an hour.")] = 0.0,
    power: Annotated[float, typer.Option(help="What it draws, watts; 0: not known.")] = 0.0,
    quick: Annotated[bool, typer.Option("--quick", help="Only see whether everything runs.")] = False,
) -> None:
    """Measure this machine into a hardware file that plan and simulate take: bandwidth, GEMM, kernels, exchange."""
    from datetime import date

    from lamina.measure.hardware import calibrate

    check_output("out", out, ".toml")

    def keep(calibration: Calibration) -> None:
        write_text(out, calibration.dumps())

    with ProgressBars(quiet=0) as progress:
        calibration = calibrate(
            model, progress, quick, date=date.today().isoformat(), price=price, power=power, keep=keep
        )
    keep(calibration)
    for remark in calibration.remarks:
        typer.echo(remark, err=True)
    names = [device.name for device in calibration.devices] + [link.name for link in calibration.links]
    typer.echo(f"{out}: {', '.join(names)}")


def _check(path: Path, asked: PlanOptions) -> None:
    """Serve a plan here with the requests that it was made for: what it promised, and what was measured."""
    from dataclasses import asdict

    from lamina.measure.bench.plan_check import check
    from lamina.simulator.planning.plan_file import read
    from lamina.simulator.traces.catalogue import AGENTS, FILES

    plan = read(path)
    for remark in plan.one_replica().remarks():
        typer.echo(f"{path}: {remark}", err=True)
    planned = plan.trace.name.removesuffix(" (synthetic)")
    name = planned if planned in (*FILES, AGENTS) else asked.trace
    if name != planned:
        typer.echo(f"{path}: its trace, {planned}, is not a published one; --trace {name} is served instead", err=True)
    trace = _arriving(name, asked, plan.slo)
    with ProgressBars(quiet=0) as progress:
        result = check(path, trace, minutes=asked.minutes, progress=progress)
    if asked.as_json:
        figures = [
            asdict(figure) | {"difference": figure.difference, "holds": figure.holds} for figure in result.figures
        ]
        print_json(asdict(result) | {"figures": figures, "remarks": result.noise.remarks})
    else:
        print_check(result)


def _arriving(name: str, asked: PlanOptions, slo: Slo) -> Trace:
    """A trace by name, with times of arrival, which a plan and its check need."""
    from lamina.simulator.traces.catalogue import trace as trace_of
    from lamina.simulator.traces.sessions import open_loop

    trace = trace_of(name, asked.count, asked.seed, asked.trace_dir)
    return open_loop(trace, slo.ttft or 1.0, slo.tpot or 0.05)


def _names(words: str) -> list[str]:
    names = [name.strip() for name in words.split(",")]
    if not all(names) or len(names) > 32:
        raise InvalidRequest(f"system is {words!r:.80}; allowed are 1 to 32 names with commas between them")
    return names
