"""What the simulator's commands show and write: tables, sentences, JSON, and the files of a folder.

`lamina.simulator` is imported when there is a result to show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lamina.cli.terminal import print_rows
from lamina.errors import InvalidRequest
from lamina.system.text_files import write_text

if TYPE_CHECKING:
    from lamina.measure.bench.plan_check import Check, Figure
    from lamina.simulator.costs.systems import System
    from lamina.simulator.event_loop.results import RunResult
    from lamina.simulator.event_loop.simulate import Slo
    from lamina.simulator.planning.plan import Planned
    from lamina.simulator.planning.planner import Ranked

_ROWS = 10


def write_runs(folder: Path, systems: Sequence[System], results: Sequence[RunResult], slo: Slo) -> None:
    """Write a comparison to one folder: tables, JSON, CSV, charts, a report and step timelines."""
    from lamina.simulator.costs.systems import Offloaded
    from lamina.simulator.planning.comparison import step_trace
    from lamina.simulator.reports.page import html
    from lamina.simulator.reports.plots import save_comparison, save_timeline
    from lamina.simulator.reports.report import samples_csv, table, to_csv, to_json
    from lamina.system.figures import NO_PLOTS

    folder.mkdir(parents=True, exist_ok=True)
    run = results[0]
    title = f"{run.model} on {run.trace}"
    write_text(folder / "results.txt", table(results))
    write_text(folder / "results.json", to_json(results))
    write_text(folder / "results.csv", to_csv(results))
    write_text(folder / "report.html", html(results, title, slo))
    for number, (system, result) in enumerate(zip(systems, results, strict=True), 1):
        write_text(folder / f"steps-{number}.csv", samples_csv(result))
        if isinstance(system, Offloaded):
            context = result.prompt_tokens / result.requests + result.output_tokens / result.requests / 2
            write_text(folder / f"step-{number}.trace.json", step_trace(system, result.mean_batch, context))
    try:
        save_comparison(results, folder / "comparison.png")
        for number, result in enumerate(results, 1):
            save_timeline(result, folder / f"timeline-{number}.png")
    except InvalidRequest as error:
        if str(error) != NO_PLOTS:
            raise
        typer.echo(NO_PLOTS, err=True)


def plan_page(found: Planned, title: str) -> str:
    from lamina.simulator.reports.page import html

    plan: dict[str, Any] = {
        "chosen": found.winner.name,
        "why": list(found.why),
        "what would change it": [str(each) for each in (*found.sensitivity, *found.assumptions)],
        "ranking": [_row(each) for each in found.mixes(_ROWS)],
        "engine": dict(found.plan.engine),
        "points": found.points(),
    }
    return html([each.result for each in found.ranked if each.result is not None], title, found.plan.slo, plan)


def _row(ranked: Ranked) -> dict[str, Any]:
    """One candidate as a row: results of the closed form, and of the event loop where it ran."""
    found = ranked.estimate
    row: dict[str, Any] = {
        "system": ranked.name,
        "$/h": f"{found.price:.2f}",
        "serves": f"{found.taken:.3g}/s",
        "in time": f"{found.share:.0%}",
        "tokens/s": f"{found.tokens_per_second:.0f}",
        "$/M": f"{found.dollars_per_million:.2f}",
        "TPOT": f"{found.tpot * 1000:.0f} ms",
        "TTFT": f"{found.ttft:.2f} s",
        "batch": f"{found.batch:.0f}",
        "req/$": _score(found.goodput_per_dollar),
    }
    if (result := ranked.result) is not None:
        row |= {
            "simulated": f"{ranked.rate:.3g}/s",
            " in time": f"{result.slo_share:.0%}",
            " TPOT": f"{result.tpot.mean * 1000:.0f} ms",
            " TTFT": f"{result.ttft.mean:.2f} s",
            " req/$": _score(ranked.goodput_per_dollar),
        }
    return row


def _short_row(ranked: Ranked) -> dict[str, str]:
    """One candidate as a row for a terminal: of the event loop where it ran, else of the closed form."""
    found, result = ranked.estimate, ranked.result
    serves, share, tpot, ttft = found.taken, found.share, found.tpot, found.ttft
    if result is not None:
        serves, share, tpot, ttft = ranked.rate, result.slo_share, result.tpot.mean, result.ttft.mean
    return {
        "system": ranked.name,
        "$/h": f"{found.price:.2f}",
        "serves": f"{serves:.3g}/s{'*' if result is not None else ''}",
        "in time": f"{share:.0%}",
        "TPOT": f"{tpot * 1000:.0f} ms",
        "TTFT": f"{ttft:.2f} s",
        "$/M tokens": f"{found.dollars_per_million:.2f}",
        "req/$": _score(ranked.goodput_per_dollar),
    }


def _score(requests: float) -> str:
    return f"{requests:.0f}" if math.isfinite(requests) else "free"


def print_plan(found: Planned, slo: str, budget: float | None, reached: str, prefill: bool, out: Path | None) -> None:
    asked = found.demand
    rate = "as many as are served" if math.isinf(asked.rate) else f"{asked.rate:.3g}/s"
    bound = "" if budget is None else f", up to ${budget:g} an hour"
    typer.echo(
        f"{found.plan.system.model.name} on {asked.name}: {asked.requests} requests, {rate}, prompts of "
        f"{asked.prompt:.0f} and outputs of {asked.output:.0f} tokens in the mean; SLO {slo}{bound}"
    )
    from lamina.simulator.planning.comparison import chosen
    from lamina.simulator.reports.memory import kept, room

    typer.echo(f"It keeps {kept(found.plan.system.model)}; the winner has {room(found.plan.system)}")
    serving = sum(each.serves for each in found.ranked)
    typer.echo(f"{len(found.ranked)} candidates, of which {serving} serve it all; the best mixes:\n")
    rows = [_short_row(each) for each in found.mixes(_ROWS)]
    print_rows([tuple(rows[0]), *(tuple(row.values()) for row in rows)])
    typer.echo(
        "\n* as simulated, the others by formula. DOP(a, b): a devices share the dense layers, b hold KV and attend."
    )
    if found.best_of:
        typer.echo("\nBest against best, each optimised alone under the same budget:\n")
        compared = [{"kind": name, **_short_row(each)} for name, each in found.best_of.items()]
        print_rows([tuple(compared[0]), *(tuple(row.values()) for row in compared)])
    flips = found.assumptions or ("nothing that is assumed, within what is likely and half as far again",)
    for title, sentences in (
        ("Why", found.why),
        ("What would change it", found.sensitivity),
        ("Which assumption would flip it", flips),
    ):
        typer.echo(f"\n{title}")
        for sentence in sentences:
            typer.echo(f"  {sentence}")
    typer.echo("\nAssumed")
    typer.echo(f"  {reached[0].upper()}{reached[1:]}.")
    if not prefill:
        typer.echo("  Prompts are computed elsewhere, at no cost here.")
    for what, said in chosen(found.plan.system.model, found.plan.system.speculation).items():
        typer.echo(f"  {what.capitalize()}: {said}.")
    for remark in found.plan.remarks():
        typer.echo(f"  To deploy: {remark}.")
    if out is None:
        return
    from lamina.simulator.planning.deployment import commands, undeployable

    if why := undeployable(found.plan.system):
        typer.echo(f"\n{out}: written; no engine here is that: {why}")
        return
    typer.echo(f"\n{out}: written. To deploy it, and to measure here what it promises:")
    for line in (*commands(out, found.plan.replicas, found.plan.engine), f"lamina plan --check {out}"):
        typer.echo(f"  {line}")


def print_check(found: Check) -> None:
    """What was promised beside what was measured, and how steady the machine was."""
    typer.echo(f"{found.requests} requests of {found.trace}, served here in {found.seconds:.0f} s\n")
    rows = [("", "promised", "90 % interval", "measured", "difference", "holds")]
    for each in found.figures:
        points = each.unit == "%"
        rows.append(
            (
                f"{each.name}, {each.unit}" if each.unit != "$" else each.name,
                _figure(each, each.promised),
                f"{_figure(each, each.low)} to {_figure(each, each.high)}",
                _figure(each, each.measured),
                f"{each.difference * 100:+.1f}{' points' if points else '%'}",
                "yes" if each.holds else "no",
            )
        )
    print_rows(rows)
    noise = found.noise
    typer.echo(
        f"\nmachine: others used {noise.others:.0%} of the cores; memory was read at {noise.before / 1e9:.1f} GB/s "
        f"before, {noise.after / 1e9:.1f} after"
    )
    for remark in noise.remarks:
        typer.echo(f"beware: {remark}")
    for kind, count in found.failed.items():
        typer.echo(f"failed: {count} x {kind}")
    for note in found.notes:
        typer.echo(note)


def _figure(figure: Figure, value: float) -> str:
    return f"{value:.3g}" if figure.unit == "$" else f"{value:.1f}"


def plan_record(found: Planned) -> dict[str, Any]:
    """For programs. Times are seconds, rates a second, prices dollars."""

    def record(ranked: Ranked) -> dict[str, Any]:
        estimate = ranked.estimate
        made = {name: _finite(value) for name, value in asdict(estimate).items()}
        made |= {
            "system": ranked.name,
            "goodput": estimate.goodput,
            "requests_per_dollar": _finite(estimate.goodput_per_dollar),
            "dollars_per_million": _finite(estimate.dollars_per_million),
            "serves": estimate.serves,
        }
        if (result := ranked.result) is not None:
            made["simulated"] = {
                "rate": ranked.rate,
                "goodput": ranked.goodput,
                "serves": ranked.serves,
                "slo_share": result.slo_share,
                "tpot": asdict(result.tpot),
                "ttft": asdict(result.ttft),
                "tokens_per_second": result.tokens_per_second,
                "dollars_per_million": result.dollars_per_million,
                "requests_per_dollar": _finite(ranked.goodput_per_dollar),
            }
        return made

    model, capacity = found.plan.system.model, found.plan.system.capacity
    return {
        "kept": {"kv_bytes_per_token": model.kv_bytes_per_token(), "state_bytes": model.state_bytes_held},
        "room": {
            "kv_tokens": capacity.tokens if model.attentions else None,
            "state_sequences": capacity.sequences if model.states else None,
        },
        "candidates": len(found.ranked),
        "ranking": [record(each) for each in found.mixes(_ROWS)],
        "why": list(found.why),
        "ties": [each.name for each in found.ties],
        "intervals": {
            name: {part: _finite(value) for part, value in asdict(each).items()}
            for name, each in found.intervals.items()
        },
        "sensitivity": [asdict(each) for each in found.sensitivity],
        "assumptions": [{**asdict(each), "likely": each.likely} for each in found.assumptions],
        "best_of": {name: record(each) for name, each in found.best_of.items()},
        "engine": dict(found.plan.engine),
        "remarks": found.plan.remarks(),
    }


def _finite(value: Any) -> Any:
    """`value`, or None for a number that is not finite: JSON has none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
