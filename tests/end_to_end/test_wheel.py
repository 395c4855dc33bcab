"""The wheel built from the repository, in an environment that has what it depends on and no clone: it answers, serves
its page, plans, and starts attention workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.data, pytest.mark.real, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
INVENTORY = """
[[device]]
name = "host"
kind = "cpu"
flops = 5e11
memory = 8e9
bandwidth = 3e10
price = 0.5
"""


@pytest.fixture(scope="module")
def lamina(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a clean environment: the wheel is installed there, its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("lamina", "workers", "kernels", "protocols"):  # building leaves files beside what it builds
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, timeout=300)
    [wheel] = folder.glob("lamina-*.whl")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    [packages] = environment.glob("lib/python3.*/site-packages")
    installing = ["--python", str(environment / "bin" / "python"), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *installing], check=True, timeout=120)
    # A path in a .pth file is searched, and the .pth files there are not read: so no clone comes with it.
    beside = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(beside))
    return environment / "bin" / "lamina"


def run(program: Path, folder: Path, *words: str) -> str:
    """What a command prints, in an empty folder, without what names the clone."""
    done = subprocess.run(
        [str(program), *words], cwd=folder, env=CLEAN, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_code_is_the_wheels_own(lamina: Path, tmp_path: Path) -> None:
    code = "import lamina, lamina_workers, lamina_kernels, lamina_protocols as p; print(lamina.__file__, p.__file__)"
    files = run(lamina.parent / "python", tmp_path, "-c", code).split()
    assert len(files) == 2
    assert all(file.startswith(str(lamina.parents[1])) for file in files)


def test_it_answers_with_an_attention_worker(lamina: Path, tmp_path: Path) -> None:
    words = ("--max-tokens", "4", "--temperature", "0", "--attention-workers", "1", "--kv-memory", "64MiB")
    assert run(lamina, tmp_path, "generate", "The capital of France is", *words).strip()


def test_it_plans(lamina: Path, tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text(INVENTORY)
    words = ("--model", "smollm2-135m", "--inventory", "host.toml", "--slo", "tpot=1s,ttft=60s", "--rate", "0.01")
    assert "host" in run(lamina, tmp_path, "plan", *words, "--no-verify")


def test_it_serves_its_page_and_chats(lamina: Path, tmp_path: Path) -> None:
    serve = [str(lamina), "serve", "smollm2-135m", "--port", "0", "--threads", "1", "--kv-memory", "64MiB"]
    with subprocess.Popen(serve, cwd=tmp_path, env=CLEAN, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(line for line in server.stderr if " at http://" in line).split(" at ")[1].split()[0].rstrip(",;")
            with urllib.request.urlopen(f"{url}/", timeout=30) as page:
                assert b"<html" in page.read()
            body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
            asked = urllib.request.Request(
                f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(asked, timeout=120) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 4
        finally:
            server.terminate()
            server.communicate(timeout=60)
