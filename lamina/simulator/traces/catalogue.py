"""Requests over time, by name: a published trace where its file is, else one that is drawn like it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import Arrival, Trace, head, scaled
from lamina.simulator.traces.figures import published
from lamina.simulator.traces.files import FORMATS, read
from lamina.simulator.traces.rounded import spread
from lamina.simulator.traces.synthetic import distance, synthetic

FILES = {
    "azure-conv": ("azure_conv_2023.csv", "AzureLLMInferenceTrace_conv.csv"),
    "azure-code": ("azure_code_2023.csv", "AzureLLMInferenceTrace_code.csv"),
    "mooncake-conversation": ("mooncake_conversation.jsonl", "conversation_trace.jsonl"),
}
"""By name, what a trace's file is called; the last one is the publisher's own. Azure's are beside this file, packed by
gzip, under CC-BY 4.0 (`LICENCE-azure.txt`)."""


def trace(name: str | Path, count: int | None = None, seed: int = 0, folder: Path | None = None) -> Trace:
    """The trace of that name, or in the file at that path: its first `count` requests, or all.

    A published one is read from `folder` where it has the file, or from this package where that has it. Else it is
    drawn with `seed`, `count` requests or as many as the published one has; its name ends with "(synthetic)", and its
    remarks say how far it is from the published one. Times that were rounded are spread within their step, and remarks
    say so. Raises InvalidRequest.
    """
    known = FILES.get(str(name))
    if known is None and not os.path.isfile(name):  # unlike Path's own, no name is too long for it
        raise InvalidRequest(f"the trace is {str(name)!r:.200}; allowed are {', '.join(FILES)}, or {FORMATS}")
    path = Path(name) if known is None else file_of(str(name), folder)
    if path is None:
        figures = published()[str(name)]
        drawn = synthetic(figures, count, seed=seed)
        return replace(drawn, remarks=(distance(drawn, figures),))
    whole = spread(read(path, None if known is None else str(name)))
    return whole if count is None else head(whole, count)


def file_of(name: str, folder: Path | None = None) -> Path | None:
    """Where the file of a published trace is: in the folder, or in this package; None where it is in neither."""
    here = Path(__file__).with_name(f"{FILES[name][0]}.gz")
    files = [folder / file for file in FILES[name]] if folder else []
    return next((file for file in (*files, here) if file.is_file()), None)


WINDOWS = 16
"""That an excerpt is taken from."""


def windows(trace: Trace, count: int, parts: int = WINDOWS) -> Trace:
    """`count` of a trace's requests, from windows that lie evenly over it, one after another: loads and lengths change
    over a day, and its beginning alone would be another trace. All of it where it has no more."""
    total = len(trace.arrivals)
    if total <= count:
        return trace
    length = max(1, count // parts)
    taken: list[Arrival] = []
    gap = trace.seconds / (total - 1)
    for part in range(count // length):
        first = part * (total - length) // max(1, count // length - 1)
        arrivals = trace.arrivals[first : first + length]
        start = taken[-1].at + gap if taken else 0.0
        taken += [replace(arrival, at=start + arrival.at - arrivals[0].at) for arrival in arrivals]
    return Trace(trace.name, tuple(taken))


def at_rate(trace: Trace, rate: float) -> Trace:
    """The trace at so many requests a second; as it is where all come at once."""
    if not trace.seconds:
        return trace
    faster = scaled(trace, rate * trace.seconds / (len(trace.arrivals) - 1))
    return replace(faster, name=f"{trace.name} at {rate:.3g}/s")
