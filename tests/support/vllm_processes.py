"""vLLM in processes of its own environment: `vllm_texts.py`, and `vllm serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import torch
from attention_servers import process
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/support/vllm_texts.py"
PYTHON = os.environ.get("LAMINA_VLLM_PYTHON", "")
NEEDED = pytest.mark.skipif(not PYTHON, reason="LAMINA_VLLM_PYTHON names no python that has vLLM")
OFF = {name: value for name, value in os.environ.items() if not name.startswith(("LAMINA_", "OMP_"))}
OFF["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "workers", "kernels", "protocols"))
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def save_tiny(folder: Path, family: str, **changes: Any) -> None:
    """A model of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def save_adapter(folder: Path) -> None:
    """A LoRA adapter of random weights for `save_tiny`'s llama: of all projections of q and v, of rank 8."""
    width, heads = (
        SIZES["hidden_size"],
        {"q_proj": SIZES["num_attention_heads"], "v_proj": SIZES["num_key_value_heads"]},
    )
    torch.manual_seed(1)
    weights = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, count in heads.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(8, width)
            weights[f"{place}.lora_B.weight"] = torch.randn(count * SIZES["head_dim"], 8)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(heads), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass
class Run:
    """`vllm_texts.py` in a process."""

    process: subprocess.Popen[str]
    errors: IO[str]
    printed: list[str] = field(default_factory=list)

    def half(self) -> list[list[int]]:
        """The next texts that it prints."""
        tokens: list[list[int]] = self.line()
        return tokens

    def line(self) -> Any:
        """The next line of JSON."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("[["):
                return json.loads(line)
            self.printed.append(line)
        raise AssertionError(self.said()[-3000:])

    def end(self) -> int:
        """Its status, once it has ended."""
        output, _ = self.process.communicate(timeout=400)
        self.printed.append(output or "")
        return self.process.returncode

    def said(self) -> str:
        self.errors.seek(0)
        return "".join(self.printed) + self.errors.read()


@contextmanager
def started(model: Path, environment: dict[str, str], *options: str) -> Iterator[Run]:
    command = [PYTHON, str(SCRIPT), str(model), "30", *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        child = subprocess.Popen(
            command, env=OFF | environment, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=model
        )
        try:
            yield Run(child, errors)
        finally:
            child.kill()
            child.communicate()


Logarithms = list[list[tuple[int, float]]]
"""At each token of a prompt and its text, some token ids with their log probabilities."""


def answers(model: Path, environment: dict[str, str], *options: str) -> tuple[list[list[int]], Logarithms]:
    """What `vllm_texts.py` prints."""
    with started(model, environment, *options) as run:
        return run.half() + run.half(), run.line()


def listening(stack: ExitStack, address: str = "127.0.0.1:0") -> tuple[subprocess.Popen[str], str]:
    """A worker's process, and where it listens."""
    child = stack.enter_context(process("--kv-memory", str(1 << 24), "--listen", address))
    assert child.stdout is not None
    return child, str(child.stdout.readline().split()[1])


def save_tokenizer(folder: Path) -> None:
    """One for `save_tiny`, whose tokens are the words w0, w1 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(folder)


@contextmanager
def serving(model: Path, environment: dict[str, str], *flags: str) -> Iterator[tuple[str, Run]]:
    """What `vllm serve` starts, and its URL. In the CPU build's package that command looks for another package's
    version, and ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = {"max-model-len": 1024, "max-num-seqs": 16, "max-num-batched-tokens": 96, "block-size": 32}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", *options, *flags,
    ]  # fmt: skip
    space = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        child = subprocess.Popen(
            command, env=OFF | space | environment, stdout=said, stderr=said, text=True, cwd=model,
            start_new_session=True,
        )  # fmt: skip
        run, url = Run(child, said), f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 300.0
            while not healthy(url):
                assert child.poll() is None and time.monotonic() < deadline, run.said()[-3000:]  # noqa: PT018
                time.sleep(0.2)
            yield url, run
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
