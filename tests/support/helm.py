"""Renders the Helm chart with Helm's own library, in a process of its own: its Go runtime is no guest for pytest's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "docs" / "helm" / "lamina"
_CODE = """
import json, sys, helm_python
cases, found = json.load(sys.stdin), {}
with helm_python.Chart.load(sys.argv[1]) as chart:
    for name, values in cases.items():
        try:
            found[name] = list(chart.render(values, name="chat", namespace="models").values())
        except helm_python.HelmError as error:
            found[name] = str(error)
messages = helm_python.lint(sys.argv[1])["messages"]
print(json.dumps([found, messages]))
"""


def render(cases: Mapping[str, Any]) -> tuple[dict[str, list[Any] | str], list[Any]]:
    """The objects of the chart for the values of each case, of a release `chat` in the namespace `models`, or Helm's
    error; and what its linter says of the chart."""
    command = [sys.executable, "-c", _CODE, str(CHART)]
    ran = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=60, check=True)
    found, messages = json.loads(ran.stdout)
    objects = {
        name: text if isinstance(text, str) else [o for one in text[1:] for o in yaml.safe_load_all(one) if o]
        for name, text in found.items()
    }
    return objects, messages
