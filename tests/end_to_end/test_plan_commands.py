"""The commands of docs/simulator.md from a file of this machine to a plan that is deployed and checked."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.simulator.planning import plan_file
from lamina.system.machine import native_dtype, this_machine

pytestmark = [pytest.mark.data, pytest.mark.real]

DOCUMENT = Path(__file__).parents[2] / "docs" / "simulator.md"
MACHINE = """
[[device]]                # two cores, about; calibrate-hardware would take minutes
name = "this-machine"
kind = "cpu"
flops = 5e11
memory = 8e9
bandwidth = 3e10
price = 0.5
"""


def commands() -> dict[str, list[str]]:
    """Of the first block, by the first two words."""
    block = DOCUMENT.read_text().split("```\n", 2)[1]
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("lamina ")]
    return {" ".join(words[:2]): words for words in reversed(lines)}


def run(folder: Path, words: list[str]) -> str:
    code = "import sys; from lamina.cli.main import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(native_dtype(this_machine())[0] != "bfloat16", reason="the plan is of bfloat16 weights")
@pytest.mark.timeout(900)
def test_the_documents_lines_plan_deploy_and_check(tmp_path: Path) -> None:
    known = commands()
    (tmp_path / "this-machine.toml").write_text(MACHINE)
    said = run(tmp_path, known["plan --model"])
    assert "lamina serve --plan plan.toml" in said
    plan = plan_file.read(tmp_path / "plan.toml")
    assert (plan.model, plan.engine["device"], plan.engine["weights"]) == ("smollm2-135m", "cpu", "bfloat16")
    assert len(run(tmp_path, [*known["generate --plan"], "--max-tokens", "8", "--temperature", "0"])) > 8
    checked = run(tmp_path, [*known["plan --check"], "--minutes", "1.6"])
    for what in ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "in time", "output", "$/M tokens", "machine: other"):
        assert what in checked
    assert max(map(len, checked.splitlines()[:14])) <= 100
