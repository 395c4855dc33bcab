"""vLLM with its KV on Lamina's attention workers, and what is loaded where it has none.

vLLM has an environment of its own, which `scripts/vllm_env` makes: `scripts/test --vllm` runs these tests in it.
`LAMINA_VLLM_PYTHON` names its python; without it they are skipped, and say so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from attention_servers import until
from vllm_processes import NEEDED, OFF, ROOT, Logarithms, Run, answers, listening, save_adapter, save_tiny, started

from lamina.behind import SWITCH
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerUnreachable


def test_a_plugin_that_is_not_switched_on_loads_nothing() -> None:
    code = (
        "import sys; from lamina.behind.vllm_plugin import register; before = set(sys.modules); register(); "
        "print(sorted(set(sys.modules) - before), [m for m in sys.modules if m.startswith(('torch', 'numba', 'vllm'))])"
    )
    child = subprocess.run([sys.executable, "-c", code], env=OFF, cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[] []"


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {
        "sliding_window": 40,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "gemma4_text": {  # its last two layers share the KV of others
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"],
        "sliding_window": 40,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 512,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, request.param, **FAMILIES[request.param])
    return folder


@pytest.fixture(scope="module")
def alone(model: Path) -> tuple[list[list[int]], Logarithms]:
    """What vLLM says alone."""
    return answers(model, {})


@pytest.fixture(scope="module")
def right(alone: tuple[list[list[int]], Logarithms]) -> list[list[int]]:
    return alone[0]


@pytest.mark.real
@pytest.mark.timeout(900)
@NEEDED
@pytest.mark.parametrize("workers", [1, 2])
def test_greedy_tokens_are_those_of_vllm_alone(
    workers: int, model: Path, alone: tuple[list[list[int]], Logarithms]
) -> None:
    with ExitStack() as stack:
        addresses = [listening(stack)[1] for _ in range(workers)]
        tokens, logarithms = answers(model, {SWITCH: ",".join(addresses)})
        assert tokens == alone[0]
    assert len(logarithms) == len(alone[1]) > 300
    for here, there in zip(logarithms, alone[1], strict=True):
        assert [token for token, _ in here] == [token for token, _ in there]
        assert [value for _, value in here] == pytest.approx([value for _, value in there], abs=1e-3)


GUESSES = 'speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}'


@pytest.mark.real
@pytest.mark.timeout(900)
@NEEDED
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_greedy_tokens_stay_when_vllm_guesses_some(model: Path, right: list[list[int]]) -> None:
    with ExitStack() as stack:
        tokens, _ = answers(model, {SWITCH: listening(stack)[1]}, GUESSES)
        assert tokens == right


@pytest.mark.real
@pytest.mark.timeout(900)
@NEEDED
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_greedy_tokens_stay_where_some_prompts_have_an_adapter(
    model: Path, right: list[list[int]], tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    adapter = ["enable_lora=true", "max_lora_rank=8", f"adapter={json.dumps(str(tmp_path))}"]
    without, _ = answers(model, {}, *adapter)
    with ExitStack() as stack:
        tokens, _ = answers(model, {SWITCH: listening(stack)[1]}, *adapter)
    assert tokens == without
    assert without != right


REFUSED = {
    "falcon_h1": ("layers with states", {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32}),
    "deepseek_v2": ("MLA", {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}),
    "llama": ("a draft model's KV", {}),
}


@pytest.mark.real
@pytest.mark.timeout(900)
@NEEDED
@pytest.mark.parametrize("family", REFUSED)
def test_what_workers_cannot_keep_is_refused_by_name(family: str, tmp_path: Path) -> None:
    words, changes = REFUSED[family]
    save_tiny(tmp_path, family, **changes)
    draft = json.dumps({"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 2})
    options = [f"speculative_config={draft}"] if family == "llama" else []
    with started(tmp_path, {SWITCH: "127.0.0.1:1"}, *options) as engine:
        assert engine.end() != 0
        assert words in engine.said()
        assert f"not with {SWITCH}. Unset it" in engine.said()


@pytest.mark.real
@pytest.mark.timeout(900)
@NEEDED
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_context_for_which_workers_have_no_room_is_refused_by_name(model: Path) -> None:
    with ExitStack() as stack:
        address = listening(stack)[1]
        engine = stack.enter_context(started(model, {SWITCH: address}, "num_gpu_blocks_override=10"))
        assert engine.end() != 0
        assert "a context of 512 tokens, and 9 blocks of 32; allowed: up to 288 (--max-model-len)" in engine.said()


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
        assert engine.half() + engine.half() == right
        assert engine.end() == 0
        assert engine.said().count("computed again") >= 3


@pytest.mark.real
@pytest.mark.timeout(900)
@pytest.mark.fault("F01")
@NEEDED
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_workers_that_vllm_starts_are_started_again_and_end_with_it(model: Path, right: list[list[int]]) -> None:
    with started(model, {SWITCH: "local:2", "LAMINA_BEHIND_KV_MEMORY": "16MiB"}) as engine:
        first = engine.half()
        workers = local_workers(engine)
        assert [os.sched_getaffinity(pid) for pid in workers] == [os.sched_getaffinity(0)] * 2
        os.kill(workers[0], signal.SIGKILL)
        assert first + engine.half() == right
        workers = local_workers(engine)
        assert len(workers) == 2
        assert engine.end() == 0
        assert "computed again" in engine.said()
        assert not any("attention_main" in command(pid) for pid in workers)
    with started(model, {SWITCH: "local:2", "LAMINA_BEHIND_KV_MEMORY": "16MiB"}) as engine:
        until(lambda: len(local_workers(engine)) == 2, 300.0)
        workers = local_workers(engine)
        engine.process.kill()
        until(lambda: not any("attention_main" in command(pid) for pid in workers), 30.0)


def local_workers(engine: Run) -> list[int]:
    """The attention workers that are children of the engine's process."""
    pids = Path(f"/proc/{engine.process.pid}/task").glob("*/children")
    children = [int(pid) for path in pids for pid in path.read_text().split()]
    return [pid for pid in children if "attention_main" in command(pid)]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return ""


PARALLEL = {
    "tensor": ["tensor_parallel_size=2"],
    "pipeline": ["pipeline_parallel_size=2", "enforce_eager=false"],  # vLLM's CPU build ends where it is eager
}
RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.mark.real
@pytest.mark.timeout(900)
@pytest.mark.fault("F01")
@NEEDED
@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize("options", PARALLEL.values(), ids=PARALLEL)
def test_each_process_of_a_model_has_its_part_of_the_workers(
    options: list[str], model: Path, right: list[list[int]]
) -> None:
    with ExitStack() as stack:
        children, addresses = zip(*(listening(stack) for _ in range(2)), strict=True)
        environment = RANKS | {SWITCH: ",".join(addresses)}
        engine = stack.enter_context(started(model, environment, *options))
        first = engine.half()
        children[1].kill()
        children[1].wait()
        listening(stack, addresses[1])
        assert first + engine.half() == right
        assert engine.end() == 0
        assert "computed again" in engine.said()


@pytest.mark.real
@pytest.mark.timeout(900)
@NEEDED
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_process_of_a_model_without_a_worker_is_refused_by_name(model: Path) -> None:
    with started(model, RANKS | {SWITCH: "127.0.0.1:7311"}, "tensor_parallel_size=2") as engine:
        assert engine.end() != 0
        assert "'127.0.0.1:7311', for a model of 2 processes; allowed: host:port,... or local:N" in engine.said()


def batches(client: WorkerClient) -> int:
    """How many the worker there has computed; 0 while none answers."""
    try:
        return client.status(5.0).batches
    except WorkerUnreachable:
        return 0
