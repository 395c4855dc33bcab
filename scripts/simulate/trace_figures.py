#!/usr/bin/env python3
"""Derives lamina/simulator/traces/trace_figures.toml from the published traces.

usage: scripts/simulate/trace_figures.py FOLDER > lamina/simulator/traces/trace_figures.toml

FOLDER has their files, named as in `lamina.simulator.traces.catalogue.FILES`. Their sources are below.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from lamina.simulator.traces.catalogue import FILES, trace
from lamina.simulator.traces.figures import LEVELS, Quantiles, measure

AZURE = "Azure LLM inference trace 2023 (Splitwise, ISCA 2024), github.com/Azure/AzurePublicDataset"
MOONCAKE = "Mooncake, FAST'25 release, conversation trace, github.com/kvcache-ai/Mooncake"
SOURCES = {
    "azure-conv": (AZURE, "CC-BY 4.0"),
    "azure-code": (AZURE, "CC-BY 4.0"),
    "mooncake-conversation": (MOONCAKE, "Apache-2.0"),
}
WIDTH = 116


def derive(folder: Path) -> str:
    """The file's text. Raises InvalidRequest, also where a trace is missing."""
    levels = ", ".join(f"{100 * level:g}" for level in LEVELS)
    lines = [
        "# Derived by scripts/simulate/trace_figures.py from the traces that are named; what each number means says",
        "# lamina/simulator/traces/figures.py. Tokens and seconds. Lists are the quantiles at these percentages:",
        *wrapped(levels, "# "),
    ]
    for name in FILES:
        real = trace(name, folder=folder)
        if real.name != name:
            raise SystemExit(f"{folder} has none of {', '.join(FILES[name])}")
        figures = measure(real, *SOURCES[name])
        lines += ["", f"[{name}]", *table(figures)]
        if figures.sharing:
            lines += ["", f"[{name}.sharing]", *table(figures.sharing)]
    return "\n".join(lines) + "\n"


def table(figures: Any) -> list[str]:
    """A line for each field that is not left at nothing; the name is the table's own."""
    lines = []
    for field in fields(figures):
        value = getattr(figures, field.name)
        if isinstance(value, Quantiles):
            lines += [f"{field.name} = [", *wrapped(", ".join(map(number, value.values)) + ",", "    "), "]"]
        elif isinstance(value, str) and field.name != "name":
            lines.append(f'{field.name} = "{value}"')
        elif isinstance(value, (int, float)) and value:
            lines.append(f"{field.name} = {value!r}")
    return lines


def number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def wrapped(text: str, indent: str) -> list[str]:
    lines = [indent]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 1 > WIDTH:
            lines.append(indent)
        lines[-1] += word if lines[-1] == indent else f" {word}"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    sys.stdout.write(derive(parser.parse_args().folder))


if __name__ == "__main__":
    main()
