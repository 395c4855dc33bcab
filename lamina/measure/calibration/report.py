"""What calibration found, for people: one page of HTML that needs nothing else, with maps of heads in colours."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np

from lamina.errors import PolicyError
from lamina.measure.calibration.calibrate import Calibration
from lamina.measure.calibration.quality import Target
from lamina.measure.calibration.scores import Scores
from lamina.policy_file import dumps, kept, kept_share
from lamina.system.text_files import write_text

_MEASURES = {
    "kept": "Share of the tokens that a head keeps under the choice",
    "echo": "Echo: attention to the same token in earlier repeats (RazorAttention)",
    "induction": "Induction: attention to the token after it (RazorAttention)",
    "mean_attention": "Area under the cumulated attention of the mean query (DuoAttention without gradients)",
    "alpha": "Gate after training: 1 needs full attention, 0 does not (DuoAttention)",
    "influence": "Estimated change of predictions in nats a token, mean over what was allowed (logarithm)",
    "combined": "Mean rank under all measures",
}
_STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.15em .6em;text-align:right;border-bottom:1px solid #ddd}
th{text-align:left}pre{background:#f6f6f6;padding:1em;overflow-x:auto}
.maps{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0}.maps table{margin:.3em 0;border:1px solid #ddd}
.maps td{width:14px;height:8px;padding:0;border:0}"""


def measures(found: Calibration) -> dict[str, Scores]:
    """Every number that has one value a head, `[layers, kv_heads]`, by the names that the report uses."""
    evidence, context = found.evidence, found.context
    shares = np.array([[kept(policy, context) / context for policy in layer] for layer in found.file.heads])
    return {"kept": shares, **evidence.by_head(), "combined": evidence.combined()}


def write_report(path: Path, found: Calibration, target: Target) -> None:
    """Write PATH.html for a policy file at `path`. Raises PolicyError where it cannot be written."""
    write_text(path.with_suffix(".html"), page(found, target, measures(found)), PolicyError)


def page(found: Calibration, target: Target, of: Mapping[str, Scores]) -> str:
    """The page, which needs no other file."""
    file, context = found.file, found.context
    full = sum(policy == "full" for layer in file.heads for policy in layer)
    count = sum(map(len, file.heads))
    if found.chosen is None:
        verdict = "No choice met the target: every head stays full."
    else:
        verdict = f"{full} of {count} KV heads stay full. {found.chosen.quality}."
    parts = [
        f"<h1>KV policies of {escape(file.model)}</h1>",
        f"<p><b>{escape(verdict)}</b></p>",
        f"<p>At {context} tokens the choice keeps {kept_share(file.heads, context):.1%} of the KV, before rounding to "
        f"pages. The target, quality {target.quality:g}, means: NLL rises by {target.nll_change:.1%} at most, the "
        f"likeliest token stays the same for at least {target.agreement:.1%}, and as many hidden passkey words are "
        "found as with the full cache. All of that was measured with the serving runtime on text that the choice had "
        "not seen, prompt included.</p>",
        "<h2>What was tried</h2>",
        _trials(found, target),
        "<h2>Heads</h2>",
        "<ul>"
        + "".join(f"<li><b>{name}</b>: {escape(text)}</li>" for name, text in _MEASURES.items() if name in of)
        + "</ul>",
    ]
    parts += [f'<div class="maps">{"".join(_heat_map(name, values) for name, values in of.items())}</div>']
    parts += [_scores(found, of), "<h2>The policy file</h2>", f"<pre>{escape(dumps(file))}</pre>"]
    title = f"KV policies of {escape(file.model)}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _trials(found: Calibration, target: Target) -> str:
    names = ("tokens", "KV held", "NLL change", "top-1 agreement", "passkey words", "with the full cache", "target")
    rows = [_row("th", names)]
    for trial in sorted(found.trials, key=lambda trial: trial.quality.held):
        quality = trial.quality
        cells = (
            str(quality.context),
            f"{quality.held:.3f}",
            f"{quality.nll_change:+.2%}",
            f"{quality.agreement:.2%}",
            f"{quality.passkeys} of {quality.words}",
            str(quality.passkeys_full),
            "met" if target.met(quality) else "missed",
        )
        rows.append(_row("td", cells))
    return f"<table>{''.join(rows)}</table>"


def _scores(found: Calibration, of: Mapping[str, Scores]) -> str:
    rows = [_row("th", ("layer", "KV head", "policy", *of))]
    scaled = {name: _scaled(_shown(name, values)) for name, values in of.items()}
    for layer, policies in enumerate(found.file.heads):
        for head, policy in enumerate(policies):
            cells = [
                f'<td style="{_colour(scaled[name][layer, head] * 0.6)}">{values[layer, head]:.3g}</td>'
                for name, values in of.items()
            ]
            rows.append(f"<tr><td>{layer}</td><td>{head}</td><td>{escape(policy)}</td>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _heat_map(name: str, values: Scores) -> str:
    """A measure as colours, layers down and KV heads across."""
    cells = "</tr><tr>".join(
        "".join(f'<td style="{_colour(x)}">' for x in layer) for layer in _scaled(_shown(name, values))
    )
    return f"<figure><figcaption>{name}</figcaption><table><tr>{cells}</tr></table></figure>"


def _colour(share: float) -> str:
    return f"background:rgba(31,120,180,{share:.2f})"


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _shown(name: str, values: Scores) -> Scores:
    """Values as a colour shows them: influence spans orders of magnitude."""
    scaled: Scores = np.log10(np.maximum(values, 1e-9)) if name == "influence" else values
    return scaled


def _scaled(values: Scores) -> Scores:
    low, high = float(values.min()), float(values.max())
    scaled: Scores = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return scaled
