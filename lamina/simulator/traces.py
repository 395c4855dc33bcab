"""Requests over time, by name: a published trace where its file is, else one that is drawn like it.

Everything about traces that others use is named here.
"""

from __future__ import annotations

import os
from pathlib import Path

from lamina.errors import InvalidRequest
from lamina.simulator.arrivals import (
    BLOCK,
    MAX_REQUESTS,
    MAX_TOKENS,
    Arrival,
    Trace,
    all_at_once,
    head,
    scaled,
    split,
    tokens,
)
from lamina.simulator.synthetic import Lengths, gamma, poisson, synthetic
from lamina.simulator.trace_figures import Figures, Quantiles, published, summary, uniform
from lamina.simulator.trace_files import FORMATS, read

__all__ = [
    "BLOCK",
    "FILES",
    "MAX_REQUESTS",
    "MAX_TOKENS",
    "Arrival",
    "Figures",
    "Lengths",
    "Quantiles",
    "Trace",
    "all_at_once",
    "gamma",
    "head",
    "poisson",
    "published",
    "read",
    "scaled",
    "split",
    "summary",
    "synthetic",
    "tokens",
    "trace",
    "uniform",
]

FILES = {
    "azure-conv": ("azure_conv_2023.csv", "AzureLLMInferenceTrace_conv.csv"),
    "azure-code": ("azure_code_2023.csv", "AzureLLMInferenceTrace_code.csv"),
    "mooncake-conversation": ("mooncake_conversation.jsonl", "conversation_trace.jsonl"),
}
"""By name, what a trace's file is called; the last one is the publisher's own."""


def trace(name: str | Path, count: int | None = None, seed: int = 0, folder: Path | None = None) -> Trace:
    """The trace of that name, or in the file at that path: its first `count` requests, or all.

    A published one is read from `folder` where it has the file; else it is drawn with `seed`, `count` requests or as
    many as the published one has, and its name ends with "(synthetic)". Raises InvalidRequest.
    """
    known = FILES.get(str(name))
    if known is None and not os.path.isfile(name):  # unlike Path's own, no name is too long for it
        raise InvalidRequest(f"the trace is {str(name)!r:.200}; allowed are {', '.join(FILES)}, or {FORMATS}")
    if known is None:
        found, named = Path(name), None
    else:
        files = [folder / file for file in known if (folder / file).is_file()] if folder else []
        if not files:
            return synthetic(published()[str(name)], count, seed=seed)
        found, named = files[0], str(name)
    whole = read(found, named)
    return whole if count is None else head(whole, count)
