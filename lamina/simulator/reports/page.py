"""The page of a report: runs, and a plan where there is one, as one file of HTML. Pure; `report.html` is its name.

Charts are `svg_charts`', numbers those of `data`; here is what stands where, and in which words. Everything that comes
from a result or a plan is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from lamina.simulator.event_loop.results import Distribution, RunResult
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.reports import svg_charts
from lamina.simulator.reports.data import (
    KEPT,
    NONE_KEEPS,
    TIERS,
    UNKNOWN,
    X_LABEL,
    Y_LABEL,
    Point,
    best_of,
    checked,
    columns,
    labels,
    numbered,
    over_time,
    printable,
    words,
)

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.5rem;line-height:1.25;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2em 0 .4em}h3{font-size:.95rem;margin:1.3em 0 .3em;overflow-wrap:anywhere}
p{margin:.4em 0;max-width:80ch}p,li,dd,dt{overflow-wrap:anywhere}.soft{color:var(--soft)}
ul{padding-left:1.2em;margin:.4em 0;max-width:80ch}li{margin:.15em 0}
.verdict{background:var(--panel);border-left:4px solid var(--best);padding:8px 14px;margin:16px 0;max-width:1000px}
.verdict p{max-width:none}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:26px 34px;margin-top:12px}
figure{margin:0;max-width:450px}figcaption{font-weight:650;margin-bottom:8px}figcaption span{font-weight:400}
.wide{max-width:660px;margin-top:14px}
.scroll{overflow-x:auto;margin:8px 0;border:1px solid var(--rule);border-radius:4px;width:fit-content;max-width:100%}
table{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums;font-size:13.5px}
th,td{padding:6px 8px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-weight:600;line-height:1.25;vertical-align:bottom}
thead span{display:block;color:var(--soft);font-weight:400}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--page);
border-right:1px solid var(--rule)}
th[scope=row]{font-weight:500;white-space:normal;min-width:9.5em;max-width:18em;overflow-wrap:anywhere}
td.best{font-weight:700;color:var(--best)}th.text{text-align:left}td.text{text-align:left;white-space:normal}
td.text:first-child{min-width:18em}td.text+td.text{min-width:4em}
dl{display:grid;grid-template-columns:minmax(7em,max-content) 1fr;gap:4px 16px;margin:.5em 0;max-width:90ch}
dt{color:var(--soft);max-width:20em}dd{margin:0;min-width:0;grid-column:2}dd>ul,dd>p,dd>dl{margin-top:0}
ol{margin:.4em 0;padding-left:2.2em}
@media (max-width:600px){.rows thead{display:none}.rows table,.rows tbody,.rows tr,.rows td{display:block}
.rows tr{padding:6px 0;border-bottom:1px solid var(--rule)}
.rows td,.rows td:first-child{display:flex;gap:1em;justify-content:space-between;position:static;border:0;
padding:1px 8px;text-align:right;min-width:0}.rows td::before{content:attr(data-head);color:var(--soft)}
dl{grid-template-columns:1fr;gap:0}dd{margin:0 0 .5em;padding-left:.8em;grid-column:1}}
"""
_CLEARLY = 1.02  # times as much, to be worth a word
_LOADED = 1.15  # the same where all keep up with the load that is offered: runs differ by how they end
_OTHERS = 12  # systems up to which each batch is drawn in front of all others
_LATENCIES = {"ttft": "Time to first token", "tpot": "Time per output token", "tbt": "Time between tokens"}
_TERMS = """<h2>Terms</h2><dl>
<dt>TTFT</dt><dd>time to first token, from a request's arrival</dd>
<dt>TPOT</dt><dd>time per output token after the first, mean of a request</dd>
<dt>TBT</dt><dd>time between two tokens of a request</dd>
<dt>p50, p90, p99</dt><dd>half, nine tenths, 99 of 100 are at most that</dd>
<dt>DOP(a, b)</dt><dd>a devices share the dense layers, b others hold the KV and compute attention</dd>
<dt>goodput</dt><dd>requests a second that met the SLO; all of them where none was set</dd>
<dt>when full</dt><dd>output while a request waited for room, without a run's beginning and end</dd>
<dt>busy</dt><dd>share of the run's seconds that a tier worked</dd>
<dt>1.21×</dt><dd>against the first system</dd></dl>"""


def html(
    results: Iterable[RunResult],
    title: str,
    slo: Slo | None = None,
    plan: Mapping[str, Any] | None = None,
    remarks: Sequence[str] = (),
) -> str:
    """One page with table, charts and assumptions. It asks for nothing from elsewhere and runs no script.

    The first system is the one that others are compared with; `remarks` stand beside what is said of them. Of `plan`,
    which a planner makes, `points` are candidates for a Pareto plot over `x`, with the name of the `chosen` one and
    what `candidates` says of all; everything else is shown under its key: texts, numbers, lists of texts, mappings, and
    lists of mappings as tables. Raises InvalidRequest without results.
    """
    runs = checked(results)
    names = labels(runs)
    fields = dict(plan or {})
    points, across = fields.pop("points", ()), fields.pop("x", X_LABEL)
    about = fields.pop("candidates", "")
    limits = {key: seconds for key, seconds in asdict(slo or Slo()).items() if seconds is not None}
    sentences = [*_verdict(runs, names), *map(_text, remarks)]
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(_about(runs, limits))}</p>',
        f'<div class="verdict">{"".join(f"<p>{line}</p>" for line in sentences)}</div>',
    ]
    if fields:
        parts.append(f"<h2>The plan</h2>{_sections(fields)}")
    if points:
        parts.append(f"<h2>Candidates</h2>{_candidates(points, fields.get('chosen', ''), across, about)}")
    parts += ["<h2>Throughput and cost</h2>", _charts(_bar_charts(runs, names))]
    latencies = _latency_charts(runs, names, limits)
    if latencies:
        parts += ["<h2>Latency</h2>", '<p class="soft">● p50, | p90, ◇ p99 of all requests.</p>', _charts(latencies)]
    if any(run.samples for run in runs):
        note = "Sequences in decode" + ("; grey: the other systems." if 1 < len(runs) <= _OTHERS else ".")
        parts += ["<h2>Batch over time</h2>", f'<p class="soft">{note}</p>', _charts(_batch_charts(runs, names))]
        parts += [
            "<h2>Utilisation over time</h2>",
            '<p class="soft">The busy share of each tier in a step; headings have its share of the whole run.</p>',
            _charts(_tier_charts(runs, names)),
        ]
    parts += ["<h2>All numbers</h2>", _number_table(runs, names), "<h2>What was assumed</h2>"]
    parts += [_assumptions(runs, names), _TERMS]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{_text(title)}</title>'
        f"<style>{svg_charts.STYLE}{_STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _text(text: object, most: int = 4000) -> str:
    return escape(printable(str(text), most))


def _charts(figures: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _figure(drawing: str, caption: str = "", unit: str = "") -> str:
    head = f'<figcaption>{_text(caption)} <span class="soft">{_text(unit)}</span></figcaption>' if caption else ""
    return f"<figure>{head}{drawing}</figure>"


def _about(runs: Sequence[RunResult], limits: Mapping[str, float]) -> str:
    def every(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    allowed = (f"{key.upper()} {f'{v:.4g} s' if v >= 1 else f'{v * 1e3:.4g} ms'}" for key, v in limits.items())
    return (
        f"{every(run.model for run in runs)} on {every(run.trace for run in runs)}: "
        f"{every(f'{run.requests:,}' for run in runs)} requests, seed {every(str(run.seed) for run in runs)}. "
        + (f"SLO: {', '.join(allowed)}. " if limits else "")
        + "Simulated, not measured."
    )


def _verdict(runs: Sequence[RunResult], names: Sequence[str]) -> list[str]:
    """Which system is best at what, in sentences, against the first system."""
    first, lines = runs[0], []
    measures = [
        ("Most tokens a second", [run.tokens_per_second for run in runs], "tok/s"),
        ("Most tokens a dollar", [run.tokens_per_dollar / 1e6 for run in runs], "million"),
    ]
    if any(run.slo_share < 1 for run in runs):  # otherwise none was set, or all met it
        measures.append(("Most requests within the SLO", [run.goodput for run in runs], "a second"))
    if len(runs) == 1:
        cost = (
            f" for ${words(first.dollars_per_million)} a million, at ${first.price:,.2f} an hour" if first.price else ""
        )
        lines.append(f"<b>{_text(names[0])}</b>: {words(first.tokens_per_second)} output tokens a second{cost}.")
        measures = []
    compliant = [place for place, run in enumerate(runs) if run.keeps_slo]
    if measures and not compliant:
        lines.append(f"{NONE_KEEPS}.")
    for what, values, unit in measures:
        if not compliant:
            break
        place, *others = sorted(compliant, key=lambda place: -values[place])
        full = unit == "million" or any(runs[index].mostly_full for index in compliant)
        if not values[place] > 0 or (others and values[place] < (_CLEARLY if full else _LOADED) * values[others[0]]):
            continue
        ratio = f", {values[place] / values[0]:.2f} times {_text(names[0])}" if place and values[0] > 0 else ""
        lines.append(f"{what}: <b>{_text(names[place])}</b>, {words(values[place])} {unit}{ratio}.")
    for run, name in zip(runs, names, strict=True):
        if run.finished < run.requests:
            never = f" ({run.rejected:,} could never have fitted)" if run.rejected else ""
            lines.append(f"{_text(name)} finished {run.finished:,} of {run.requests:,} requests{never}.")
    return lines


def _bar_charts(runs: Sequence[RunResult], names: Sequence[str]) -> list[str]:
    charts = []
    for caption, unit, values, known_zero in (
        ("Output", "tok/s", [run.tokens_per_second for run in runs], True),
        ("Output a dollar", "million tokens", [run.tokens_per_dollar / 1e6 for run in runs], False),
        ("Goodput", "requests/s within the SLO", [run.goodput for run in runs], True),
        ("Output a joule", "tok/J", [run.tokens_per_joule for run in runs], False),
    ):
        if not max(values) > 0:
            continue
        rows = []
        top = max((value for run, value in zip(runs, values, strict=True) if run.keeps_slo), default=math.inf)
        for run, name, value in zip(runs, names, values, strict=True):
            is_known = value > 0 or known_zero
            best = value == top and run.keeps_slo
            ratio = f"{value / values[0]:.2f}×" if len(runs) > 1 and is_known and values[0] > 0 else ""
            rows.append(svg_charts.Bar(name, value, words(value) if is_known else "not known", ratio, best))
        charts.append(_figure(svg_charts.bars(rows, f"{caption} of each system, {unit}"), caption, unit))
    return charts


def _latency_charts(runs: Sequence[RunResult], names: Sequence[str], limits: Mapping[str, float]) -> list[str]:
    charts = []
    for key, caption in _LATENCIES.items():
        latencies: list[Distribution] = [getattr(run, key) for run in runs]
        longest = max(latency.p99 for latency in latencies)
        if not longest > 0:
            continue
        scale, unit = (1.0, "s") if longest >= 2 else (1e3, "ms")
        rows = [
            svg_charts.Spread(name, latency.p50 * scale, latency.p90 * scale, latency.p99 * scale)
            for name, latency in zip(names, latencies, strict=True)
        ]
        limit = limits[key] * scale if key in limits else None
        about = f"{key.upper()} percentiles of each system, {unit}"
        charts.append(_figure(svg_charts.spreads(rows, unit, about, limit), caption, key.upper()))
    return charts


def _batch_charts(runs: Sequence[RunResult], names: Sequence[str]) -> list[str]:
    lines = [over_time(run.samples, lambda sample: sample.decode) for run in runs]
    seconds = max((x for line in lines for x, _ in line), default=0.0)
    high = max((y for line in lines for _, y in line), default=0.0)
    charts = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        note = f"mean {words(run.mean_batch)}, peak {run.peak_batch:,}"
        others = [line for number, line in enumerate(lines) if number != place] if len(runs) <= _OTHERS else []
        curve = svg_charts.Curve("model", lines[place])
        charts.append(
            _figure(svg_charts.panel(name, note, [curve], seconds, high, f"Batch over time of {name}", others))
        )
    return charts


def _tier_charts(runs: Sequence[RunResult], names: Sequence[str]) -> list[str]:
    seconds = max((sample.at for run in runs for sample in run.samples), default=0.0)
    charts = []
    for run, name in zip(runs, names, strict=True):
        means = (run.model_utilisation, run.attention_utilisation, run.network_utilisation)
        curves = [
            svg_charts.Curve(tier, over_time(run.samples, share), f"{tier} {mean:.0%}")
            for (tier, share), mean in zip(TIERS, means, strict=True)
        ]
        about = f"Busy share of each tier over time, {name}"
        charts.append(_figure(svg_charts.panel(name, "", curves, seconds, 1.0, about, percent=True)))
    return charts


def _candidates(points: Sequence[Point], chosen: str, across: str, about: str) -> str:
    fits = sum(point[3] for point in points)
    sentences = about or f"{len(points):,} candidates, {fits:,} of them feasible."
    sentences += (
        " Discs are feasible, crosses are not. The numbered ones are the Pareto frontier: none beats them in both."
    )
    star = ""
    if any(point[0] == chosen for point in points):
        star = f" The star is {chosen}, the plan: most requests for a dollar, or the cheapest of ties."
    drawing = svg_charts.scatter(points, chosen, f"{Y_LABEL} over {across} of {len(points)} candidates", across)
    named = "".join(f"<li>{_text(point[0])}</li>" for point in numbered(points))
    return (
        f'<p class="soft">{_text(sentences + star)}</p><figure class="wide">{drawing}</figure>'
        f"{f'<ol>{named}</ol>' if named else ''}"
    )


def _number_table(runs: Sequence[RunResult], names: Sequence[str]) -> str:
    visible, marked = columns(runs), best_of(runs)
    heads = "".join(f'<th scope="col">{_text(column.head)}<span>{_text(column.unit)}</span></th>' for column in visible)
    rows = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        cells = "".join(
            (f'<td class="best">{column.text(run)}</td>' if place in best else f"<td>{column.text(run)}</td>")
            for column, best in zip(visible, marked, strict=True)
        )
        rows.append(f'<tr><th scope="row">{_text(name)}</th>{cells}</tr>')
    sentence = f"Bold: best of its column, {KEPT}." if any(run.keeps_slo for run in runs) else f"{NONE_KEEPS}."
    note = f'<p class="soft">{sentence} {UNKNOWN}: not known.</p>' if len(runs) > 1 else ""
    return _scrolling(f'<th scope="col">system</th>{heads}', "".join(rows)) + note


def _scrolling(head: str, body: str, kind: str = "scroll") -> str:
    return f'<div class="{kind}" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _assumptions(runs: Sequence[RunResult], names: Sequence[str]) -> str:
    """What was assumed, by subject, and for which systems where not for all."""
    entries = []
    for key in dict.fromkeys(key for run in runs for key in run.assumptions):
        texts: dict[str, list[str]] = {}
        for run, name in zip(runs, names, strict=True):
            if key in run.assumptions:
                texts.setdefault(run.assumptions[key], []).append(name)
        descriptions = [
            _text(text)
            + ("" if len(systems) == len(runs) else f' <span class="soft">({_text("; ".join(systems))})</span>')
            for text, systems in texts.items()
        ]
        entries.append(f"<dt>{_text(key)}</dt>" + "".join(f"<dd>{text}</dd>" for text in descriptions))
    return f"<dl>{''.join(entries)}</dl>" if entries else "<p>Nothing was noted.</p>"


def _sections(given: Mapping[str, Any]) -> str:
    """A plan's keys: single values together, everything else under its own head."""
    single = {key: value for key, value in given.items() if not isinstance(value, Mapping | list | tuple)}
    parts = [_tree(single)] if single else []
    parts += [f"<h3>{_text(key)}</h3>{_tree(value)}" for key, value in given.items() if key not in single]
    return "".join(parts)


def _tree(given: Any) -> str:
    """The content of a plan, as lists and tables."""
    if isinstance(given, Mapping):
        rows = "".join(f"<dt>{_text(key)}</dt><dd>{_tree(value)}</dd>" for key, value in given.items())
        return f"<dl>{rows}</dl>"
    if isinstance(given, list | tuple):
        if given and all(isinstance(item, Mapping) for item in given):
            return _rows(given)
        return "<ul>" + "".join(f"<li>{_tree(item)}</li>" for item in given) + "</ul>"
    if isinstance(given, bool):
        return "yes" if given else "no"
    return words(given) if isinstance(given, float) else _text(given)


def _rows(items: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for item in items for key in item))
    kind = {key: ' class="text"' if any(isinstance(item.get(key), str) for item in items) else "" for key in keys}
    head = "".join(f'<th scope="col"{kind[key]}>{_text(key)}</th>' for key in keys)
    rows = (
        "".join(f'<td{kind[key]} data-head="{_text(key)}">{_tree(item.get(key, UNKNOWN))}</td>' for key in keys)
        for item in items
    )
    return _scrolling(head, "".join(f"<tr>{row}</tr>" for row in rows), "scroll rows")
