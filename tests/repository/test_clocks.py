"""Times that people see come from the wall clock, which jumps; no deadline and no duration does."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("lamina", "workers/lamina_workers", "kernels/lamina_kernels", "protocols/lamina_protocols")
WALL = {
    ("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today"),
}  # fmt: skip
SHOWN = {
    "lamina/cli/bench.py": "the date of a report",
    "lamina/cli/doctor.py": "in how many days a certificate ends",
    "lamina/cli/simulate.py": "the date of a report",
    "lamina/joining/server.py": "since when a machine is in its state",
    "lamina/ray_cluster/actor.py": "the age of a folder that an earlier process left",
    "lamina/server/metrics/tracing.py": "the times of spans",
    "lamina/server/openai/answers.py": "`created`",
    "lamina/server/openai/model_routes.py": "`created`",
    "lamina/server/openai/responses/events.py": "`created_at`",
    "lamina/server/page/page.py": "the times of events",
    "lamina/server/processes/kv_events.py": "the times of events",
    "lamina/server/processes/supervisor.py": "the age of a folder that an earlier process left",
    "lamina/text/chat_template_child.py": "the date that a chat template asks for",
    "workers/lamina_workers/process/credentials.py": "from when to when a certificate is valid",
}


def readings(source: str) -> list[str]:
    """Where a wall clock is read, or handed on to be read."""
    if not any(f"{module}.{name}" in source for module, name in WALL):  # most files are not parsed
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if (name, node.attr) in WALL:
                found.append(f"{name}.{node.attr}")
    return found


def test_only_what_people_see_is_by_the_wall_clock() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if readings(path.read_text())}
    assert found == set(SHOWN)
    assert readings("f(time.time)\nx = datetime.datetime.now()") == ["time.time", "datetime.now"]
