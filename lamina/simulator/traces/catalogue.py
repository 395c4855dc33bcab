"""Requests over time, by name: a published trace, or sessions that are drawn."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import Arrival, Trace, head, scaled, spread
from lamina.simulator.traces.files import FORMATS, read
from lamina.simulator.traces.sessions import coding_agents

FILES = {
    "azure-conv": ("azure_conv_2023.csv", "AzureLLMInferenceTrace_conv.csv"),
    "azure-code": ("azure_code_2023.csv", "AzureLLMInferenceTrace_code.csv"),
    "mooncake-conversation": ("mooncake_conversation.jsonl", "conversation_trace.jsonl"),
}
"""By name, what a trace's file is called; the last one is the publisher's own. Azure's are beside this file, packed by
gzip, under CC-BY 4.0 (`LICENCE-azure.txt`)."""
MOONCAKE = "github.com/kvcache-ai/Mooncake, FAST25-release"
AGENTS = "coding-agents"
"""The name of the sessions that are drawn (`sessions.coding_agents`)."""
WINDOWS = 16
"""Windows that an excerpt is taken from."""


def trace(name: str | Path, count: int | None = None, seed: int = 0, folder: Path | None = None) -> Trace:
    """The trace of that name, or in the file at that path: its first `count` requests, or all.

    A published one is read from `folder` where it has the file, or from this package where that has it. Times that were
    rounded are spread within their step, and remarks say so. "coding-agents" are sessions that are drawn with `seed`
    (`sessions.coding_agents`). Raises InvalidRequest.
    """
    if str(name) == AGENTS:
        return coding_agents(seed=seed) if count is None else coding_agents(count, seed)
    files = FILES.get(str(name))
    if files is None and not os.path.isfile(name):  # unlike Path's own, no name is too long for it
        raise InvalidRequest(
            f"the trace is {str(name)!r:.200}; allowed are {', '.join((*FILES, AGENTS))}, or {FORMATS}"
        )
    path = Path(name) if files is None else file_of(str(name), folder)
    if path is None:
        raise InvalidRequest(
            f"the trace {name} is not in this package; needed is a folder (--trace-dir) with its file, "
            f"{FILES[str(name)][-1]}, from {MOONCAKE}"
        )
    requests = spread(read(path, None if files is None else str(name)))
    return requests if count is None else head(requests, count)


def file_of(name: str, folder: Path | None = None) -> Path | None:
    """Where the file of a published trace is: in the folder, or in this package; None where it is in neither."""
    packaged = Path(__file__).with_name(f"{FILES[name][0]}.gz")
    files = [folder / file for file in FILES[name]] if folder else []
    return next((file for file in (*files, packaged) if file.is_file()), None)


def windows(trace: Trace, count: int, parts: int = WINDOWS) -> Trace:
    """`count` of a trace's requests, from windows that lie evenly over it, one after another: loads and lengths change
    over a day, and its beginning alone would be another trace. All of it where it has no more.

    What is lost: a load that stays high for longer than a window. Of sessions it takes whole ones, evenly, at most
    `count` steps of them.
    """
    arrivals, total = trace.arrivals, len(trace.arrivals)
    if total <= count:
        return trace
    if any(arrival.after is not None for arrival in arrivals):
        return _sessions(trace, count)
    length = max(1, count // parts)
    parts = count // length
    gap = trace.seconds / (total - 1)
    excerpt: list[Arrival] = []
    for part in range(parts):
        begin = part * (total - length) // max(1, parts - 1)
        start = excerpt[-1].at + gap if excerpt else 0.0
        window = arrivals[begin : begin + length]
        excerpt += [replace(arrival, at=start + arrival.at - window[0].at) for arrival in window]
    return replace(trace, arrivals=tuple(excerpt))


def _sessions(trace: Trace, count: int) -> Trace:
    """Every nth session, so much earlier that as many begin in a second."""
    roots: list[int] = []  # of each request, the number of its session
    session_count = 0
    for arrival in trace.arrivals:
        roots.append(session_count if arrival.after is None else roots[arrival.after])
        session_count += arrival.after is None
    share = count / len(roots)
    while True:
        places = [number for number, root in enumerate(roots) if int((root + 1) * share) > int(root * share)]
        if len(places) <= count or share * session_count < 2:
            break
        share *= 0.9
    numbers = {number: place for place, number in enumerate(places)}
    excerpt = []
    for number in places:
        arrival = trace.arrivals[number]
        after = None if arrival.after is None else numbers[arrival.after]
        excerpt.append(replace(arrival, at=arrival.at * share, after=after))
    return replace(trace, arrivals=tuple(excerpt[:count]))


def at_rate(trace: Trace, rate: float) -> Trace:
    """The trace at so many requests a second; as it is where all come at once."""
    if not trace.seconds:
        return trace
    faster = scaled(trace, rate * trace.seconds / (len(trace.arrivals) - 1))
    return replace(faster, name=f"{trace.name} at {rate:.3g}/s")
