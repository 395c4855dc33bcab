"""What the simulator's commands show and write: tables, sentences, JSON, and the files of a folder.

`lamina.simulator` is imported when there is a result to show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lamina.system.text_files import write_text

if TYPE_CHECKING:
    from lamina.measure.bench.plan_check import Check, Figure
    from lamina.simulator.costs.systems import System
    from lamina.simulator.event_loop.results import RunResult
    from lamina.simulator.event_loop.simulate import Slo
    from lamina.simulator.planning.behind import Weighed
    from lamina.simulator.planning.plan import Planned
    from lamina.simulator.planning.planner import Ranked
    from lamina.simulator.traces.demand import Demand

_ROWS, _CHEAPER, _RECORDS, _RUNS = 4, 2, 10, 6
"""Mixes of devices that are listed, cheaper ones with too few in time, those of JSON, and runs that are drawn."""
_PROMISED = (
    ("tpot", "time per output token (TPOT), mean, ms", 1e3, ".1f"),
    ("ttft", "time to first token (TTFT), mean, s", 1.0, ".2f"),
    ("share", "requests within the SLO, %", 1e2, ".1f"),
    ("tokens_per_second", "output tokens/s", 1.0, ",.0f"),
    ("batch", "sequences in decode per replica", 1.0, ".0f"),
    ("dollars_per_million", "$ a million output tokens", 1.0, ".2f"),
)
"""Keys of `Planned.intervals`, in words, with scale and format."""
_WEIGHED = (
    ("dollars_per_hour", "$ an hour", 1.0, ",.2f"),
    ("kv_tokens", "tokens of KV that fit", 1, ",d"),
    ("requests", "requests that fit at a time", 1, ",d"),
    ("batch", "sequences in decode per replica", 1.0, ",.0f"),
    ("step", "a decode step of these, ms", 1e3, ",.1f"),
    ("dense", "  of which dense layers", 1e3, ",.1f"),
    ("attention", "  attention", 1e3, ",.1f"),
    ("wire", "  the wire", 1e3, ",.1f"),
    ("tpot", "time per output token (TPOT), mean, ms", 1e3, ",.1f"),
    ("ttft", "time to first token (TTFT), mean, s", 1.0, ",.2f"),
    ("share", "requests within the SLO, %", 1e2, ".1f"),
    ("requests_per_second", "requests/s within the SLO", 1.0, ".3g"),
    ("tokens_per_second", "output tokens/s", 1.0, ",.0f"),
    ("dollars_per_million", "$ a million output tokens", 1.0, ",.2f"),
)
"""Keys of `Way.figures`, in words, with scale and format."""
_COPIES = "Copies between a GPU and its host take no time; the plugin never ran on a GPU."
_PROMPTS_ELSEWHERE = "Prompts are computed elsewhere, at no cost here."


def write_runs(folder: Path, results: Sequence[RunResult], slo: Slo, remarks: Sequence[str]) -> None:
    """Write a comparison to one folder: tables, JSON, CSV, and a report with charts."""
    from lamina.simulator.reports.page import html
    from lamina.simulator.reports.report import sentences, table, to_csv, to_json

    run = results[0]
    title = f"{run.model} on {run.trace}"
    remark_lines = "\n".join(["", *sentences(remarks, 0), ""]) if remarks else ""
    write_text(folder / "results.txt", table(results) + remark_lines)
    write_text(folder / "results.json", to_json(results))
    write_text(folder / "results.csv", to_csv(results))
    write_text(folder / "report.html", html(results, title, slo, remarks=remarks))


def plan_page(found: Planned, title: str) -> str:
    """The page of a plan, with the runs of the winner and of the best others that were simulated."""
    from lamina.simulator.reports.page import html

    sections: dict[str, Any] = {
        "chosen": found.winner.name,
        "answer": list(found.answer),
        "what it promises": [
            dict(zip(("what", "expected", "90 % interval"), row, strict=True)) for row in _promises(found)
        ],
        "systems": _rows(found),
        "prices": _prices(found),
        "what would change it": [str(entry) for entry in found.sensitivity],
        "engine": dict(found.plan.engine),
    }
    plan = {name: value for name, value in sections.items() if value}
    if len(found.ranked) > 1:
        plan |= {"points": found.points(), "x": _pareto_axis(found), "candidates": _counted(found)}
    runs = [entry.result for entry in (found.winner, *found.mixes(_RECORDS)) if entry.result is not None]
    return html(runs[:_RUNS], title, found.plan.slo, plan)


def _pareto_axis(found: Planned) -> str:
    from lamina.simulator.reports.data import FREE_LABEL, X_LABEL

    return FREE_LABEL if found.free else X_LABEL


def _counted(found: Planned) -> str:
    return f"{len(found.ranked):,} candidates, of which {found.serving:,} serve the whole load."


def _rows(found: Planned) -> list[dict[str, str]]:
    """The best systems on both sides of the limit by price, a row each: of the event loop where it ran, which a star
    says, else of the closed form."""
    best = {entry.name: entry for entry in (found.above, *found.mixes(_ROWS)) if entry is not None}
    rows = []
    for ranked in sorted([*found.below[:_CHEAPER], *best.values()], key=lambda entry: entry.estimate.price):
        figures = ranked.predicted
        mark = ">" if ranked is found.winner else "~" if ranked in found.ties else ""
        rows.append(
            {
                "": mark,
                "system": ranked.name,
                "$/h": f"{ranked.estimate.price:.2f}",
                "takes": f"{ranked.rate if ranked.result else figures.requests_per_second:.3g}/s",
                "in time": f"{figures.slo_share:.0%}{'*' if ranked.result else ' '}",
                "TPOT": f"{figures.tpot * 1000:.0f} ms",
                "TTFT": f"{figures.ttft:.2f} s",
                "$/M tokens": f"{figures.dollars_per_million:.2f}",
                "req/$": _score(ranked.goodput_per_dollar),
            }
        )
    if len({row["takes"] for row in rows}) == 1:  # all that is asked for
        rows = [{key: value for key, value in row.items() if key != "takes"} for row in rows]
    return rows


def _prices(found: Planned) -> str:
    """What an hour of each device costs, and since when that is so."""
    devices = {device.name: device for entry in found.ranked for device, _ in entry.candidate.system.devices}
    return ", ".join(f"{name} ${device.price:.2f}{device.priced}" for name, device in devices.items() if device.price)


def _score(requests: float) -> str:
    return f"{requests:.0f}" if math.isfinite(requests) else "free"


def _promises(found: Planned) -> list[tuple[str, str, str]]:
    """The winner's numbers as rows: what it is, its value, and the interval."""
    rows = []
    for key, name, scale, form in _PROMISED:
        if (sure := found.intervals.get(key)) is not None:
            low, value, high = (format(bound * scale, form) for bound in (sure.low, sure.value, sure.high))
            rows.append((name, value, f"{low} to {high}"))
    return rows


def header(asked: Demand, model: str, slo: str, efficiency: str, budget: float | None = None) -> str:
    """What is served, how fast, and by devices that reach what, in one sentence."""
    rate = "as many as are served" if math.isinf(asked.rate) else f"{asked.rate:.3g}/s"
    bound = "" if budget is None else f", up to ${budget:g} an hour"
    return (
        f"{model} on {asked.name}: {asked.requests} requests, {rate}, prompts of {asked.prompt:.0f} and outputs of "
        f"{asked.output:.0f} tokens on average; SLO {slo}{bound}; efficiency {efficiency}"
    )


def print_plan(
    found: Planned, said: str, reached: str, prefill: bool, out: Path | None, remarks: Sequence[str] = ()
) -> None:
    """The plan in lines of up to 100 columns: `said` first, the answer, what it promises, the best systems, and what
    would change it. `reached`: of devices without measurements; `remarks`: more that is assumed."""
    from lamina.simulator.planning.comparison import chosen
    from lamina.simulator.reports.report import grid, kept, room

    model = found.plan.system.model
    _say([said, "", *found.answer], indent=0)
    typer.echo("")
    _lines(grid([("What it promises", "expected", "90 % interval"), *_promises(found)]))
    typer.echo("")
    _table(_rows(found))
    notes = [f"Prices an hour: {prices}."] if (prices := _prices(found)) else []
    if len(found.ranked) > 1:
        legend = (
            f"{_counted(found)} > taken, * by the event loop, the others by formula. DOP(a, b): a devices share the "
            "dense layers, b hold the KV and compute attention."
        )
        notes.insert(0, legend)
    _say(notes, indent=0)
    if found.sensitivity:
        _section("What would change it", found.sensitivity)
    assumptions = [f"{reached[0].upper()}{reached[1:]}."]
    if not prefill:
        assumptions.append(_PROMPTS_ELSEWHERE)
    assumptions += [
        f"{what.capitalize()}: {words}." for what, words in chosen(model, found.plan.system.speculation).items()
    ]
    assumptions.append(f"The model keeps {kept(model)}; the winner has {room(found.plan.system)}.")
    _section(
        "Assumed", (*assumptions, *remarks, *(f"To deploy: {remark}." for remark in found.plan.one_replica().remarks()))
    )
    if out is None:
        return
    if not found.winner.serves:
        _say(["", f"{out}: written, but it does not serve all that is asked for"], indent=0)
        return
    from lamina.simulator.planning.deployment import commands, undeployable

    if why := undeployable(found.plan.system):
        _say(["", f"{out}: written, but no engine here can run it: {why}"], indent=0)
        return
    typer.echo(f"\n{out}: written. To deploy it, and to measure here what it promises:")
    for line in (*commands(out, found.plan.replicas, found.plan.engine), f"lamina plan --check {out}"):
        typer.echo(f"  {line}")


def print_weighed(weighed: Weighed, said: str, reached: str, prefill: bool) -> None:
    """An engine with workers beside it alone, in lines of up to 100 columns: `said` first, then what to take."""
    from lamina.simulator.reports.report import grid

    _say([said, "", weighed.answer, ""], indent=0)
    figures = [way.figures for way in weighed.ways.values()]
    rows = [
        (words, *(format(value[key] * scale, form) if math.isfinite(value[key]) else "-" for value in figures))
        for key, words, scale, form in _WEIGHED
    ]
    _lines(grid([("", *weighed.ways), *rows]))
    _say(["", *(f"{title}: {way.name}" for title, way in weighed.ways.items())], indent=0)
    source = "the event loop" if weighed.workers.ranked.result is not None else "formula"
    assumed = [f"Figures are by {source}.", f"{reached[0].upper()}{reached[1:]}.", _COPIES]
    _section("Assumed", assumed if prefill else [*assumed, _PROMPTS_ELSEWHERE])


def weighed_record(weighed: Weighed) -> dict[str, Any]:
    """For programs. Times are seconds, prices dollars."""
    from lamina.simulator.reports.report import finite

    return {
        "answer": weighed.answer,
        "ways": {
            title: {"system": way.name, **{key: finite(value) for key, value in way.figures.items()}}
            for title, way in weighed.ways.items()
        },
    }


def print_runs(results: Sequence[RunResult], systems: Sequence[System], said: str, remarks: Sequence[str]) -> None:
    """A comparison in lines of up to 100 columns: `said` first, the table, `remarks`, and what there is room for."""
    from lamina.simulator.reports.report import kept, room, table

    _say([said], indent=0)
    typer.echo(f"\n{table(results)}")
    _say(remarks, indent=0)
    model = systems[0].model
    _say([f"{model.name} keeps {kept(model)}", *(f"{system.name}: {room(system)}" for system in systems)], indent=0)


def _section(title: str, said: Sequence[object]) -> None:
    typer.echo(f"\n{title}")
    _say([str(sentence) for sentence in said])


def _say(said: Sequence[str], indent: int = 2) -> None:
    from lamina.simulator.reports.report import sentences

    _lines(sentences(said, indent))


def _table(rows: Sequence[Mapping[str, str]]) -> None:
    from lamina.simulator.reports.report import grid

    head = tuple(rows[0])
    _lines(grid([head, *(tuple(row.values()) for row in rows)], left=head.index("system") + 1))


def _lines(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(line)


def print_check(found: Check) -> None:
    """What was promised beside what was measured, and how steady the machine was."""
    from lamina.simulator.reports.report import grid

    typer.echo(f"{found.requests} requests of {found.trace}, served here in {found.seconds:.0f} s\n")
    rows = [("", "promised", "90 % interval", "measured", "difference", "holds")]
    for figure in found.figures:
        points = figure.unit == "%"
        rows.append(
            (
                f"{figure.name}, {figure.unit}" if figure.unit != "$" else figure.name,
                _figure(figure, figure.promised),
                f"{_figure(figure, figure.low)} to {_figure(figure, figure.high)}",
                _figure(figure, figure.measured),
                f"{figure.difference * 100:+.1f}{' points' if points else '%'}",
                "yes" if figure.holds else "no",
            )
        )
    _lines(grid(rows))
    noise = found.noise
    typer.echo("")
    machine = (
        f"machine: other processes used {noise.others:.0%} of the cores; memory was read at "
        f"{noise.before / 1e9:.1f} GB/s before, {noise.after / 1e9:.1f} after"
    )
    beware = [f"beware: {remark}" for remark in noise.remarks]
    failed = [f"failed: {count} x {kind}" for kind, count in found.failed.items()]
    _say([machine, *beware, *failed, *found.notes], indent=0)


def _figure(figure: Figure, value: float) -> str:
    return f"{value:.3g}" if figure.unit == "$" else f"{value:.1f}"


def plan_record(found: Planned) -> dict[str, Any]:
    """For programs. Times are seconds, rates a second, prices dollars."""
    from lamina.simulator.reports.report import finite

    def record(ranked: Ranked) -> dict[str, Any]:
        estimate = ranked.estimate
        fields = {name: finite(value) for name, value in asdict(estimate).items()}
        fields |= {
            "system": ranked.name,
            "goodput": estimate.goodput,
            "requests_per_dollar": finite(replace(ranked, result=None).goodput_per_dollar),
            "dollars_per_million": finite(estimate.dollars_per_million),
            "serves": estimate.serves,
        }
        if (result := ranked.result) is not None:
            fields["simulated"] = {
                "rate": ranked.rate,
                "goodput": ranked.goodput,
                "serves": ranked.serves,
                "slo_share": result.slo_share,
                "tpot": asdict(result.tpot),
                "ttft": asdict(result.ttft),
                "tokens_per_second": result.tokens_per_second,
                "dollars_per_million": result.dollars_per_million,
                "requests_per_dollar": finite(ranked.goodput_per_dollar),
            }
        return fields

    model, capacity = found.plan.system.model, found.plan.system.capacity
    return {
        "kept": {"kv_bytes_per_token": model.kv_bytes_per_token(), "state_bytes": model.state_bytes_held},
        "room": {
            "kv_tokens": capacity.tokens if model.attentions else None,
            "state_sequences": capacity.sequences if model.states else None,
        },
        "candidates": len(found.ranked),
        "ranking": [record(entry) for entry in found.mixes(_RECORDS)],
        "answer": list(found.answer),
        "below": [record(entry) for entry in found.below],
        "above": None if found.above is None else record(found.above),
        "ties": [entry.name for entry in found.ties],
        "intervals": {
            name: {part: finite(value) for part, value in asdict(entry).items()}
            for name, entry in found.intervals.items()
        },
        "sensitivity": [asdict(entry) for entry in found.sensitivity],
        "engine": dict(found.plan.engine),
        "remarks": found.plan.one_replica().remarks(),
    }
