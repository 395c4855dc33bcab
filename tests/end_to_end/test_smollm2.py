"""The real model: its rounding beside transformers', what its weights and KV take, the end of a turn, and one text for
a request that runs alone, whatever ran before it."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from model_export import export
from real_models import token_prompts

from lamina import LLM, SamplingParams
from lamina.kv.kv_shares import Share
from lamina.models.resolve import resolve

pytestmark = [pytest.mark.data, pytest.mark.real]


@pytest.fixture(scope="module")
def path():
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def unpacked(path, tmp_path_factory):
    """The model as transformers reads it, in float32."""
    return export(path, tmp_path_factory.mktemp("smollm2") / "model", torch.float32)


@pytest.fixture(scope="module")
def prompt(path):
    """2,000 tokens."""
    return token_prompts(transformers.AutoTokenizer.from_pretrained(path), 2000)[-1]


@pytest.mark.timeout(900)
def test_bfloat16_agrees_with_float32_as_often_as_transformers_does(path, unpacked, prompt):
    from lamina.measure.probe import Probe
    from lamina_protocols.messages.layers import HolderConfig
    from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
    from lamina_workers.decoder.model import Decoder
    from lamina_workers.model_config.config import ModelConfig

    def chosen(dtype):
        model = transformers.AutoModelForCausalLM.from_pretrained(unpacked, dtype=dtype).eval()
        with torch.no_grad():
            return model(torch.tensor([prompt])).logits[0].argmax(-1)

    exact, theirs = chosen(torch.float32), chosen(torch.bfloat16)
    model = ModelConfig.from_folder(path)
    with open_checkpoint(path) as checkpoint, torch.inference_mode():
        decoder = Decoder.load(model, checkpoint, torch.bfloat16)
        probe = Probe(model, decoder, HolderConfig(model.layer_specs(), 32, "bfloat16", 1 << 28))
        handle = probe.open()
        ours = [probe.read(handle, prompt[at : at + 100]).argmax(-1) for at in range(0, len(prompt), 100)]
    agreement, their_agreement = ((x == exact).float().mean().item() for x in (torch.cat(ours), theirs))
    assert agreement >= their_agreement - 0.005


LOAD = """
import resource, sys, torch
from lamina_workers.decoder.model import Decoder
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.checkpoints.weight_loader import Packing, kept_bytes

config = ModelConfig.from_folder(sys.argv[1])
torch.ones(8, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
packing = Packing(packed=sys.argv[2] == "packed")
dtype = torch.bfloat16 if packing.packed else getattr(torch, sys.argv[2])
with open_checkpoint(sys.argv[1]) as checkpoint, torch.inference_mode():
    size = kept_bytes(checkpoint, dtype, packing)
    decoder = Decoder.load(config, checkpoint, dtype, packing=packing)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)
"""


@pytest.mark.parametrize("dtype", ["packed", "bfloat16", "float32"])
def test_loading_raises_the_peak_of_memory_by_little_more_than_the_weights(path, dtype):
    done = subprocess.run([sys.executable, "-c", LOAD, path, dtype], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.3


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, max_model_len=1024, kv_memory="256MiB") as llm:
        yield llm


def test_a_page_of_kv_takes_exactly_its_keys_and_values(llm):
    layers, heads, d, size = 30, 3, 64, 32
    runtime = llm._runtime
    assert runtime.engine._control.placement.capacity == {(0, 0): (256 << 20) // (size * d * 2 * 2)}
    assert 2 * d * 2 * layers * heads == 23_040
    every = (Share(0, (0, 1, 2), 0, 4096),)
    assert runtime.limits.pages_for(every, 1) == runtime.limits.pages_for(every, size) == {(0, 0): layers * heads}


def test_chat_stops_at_the_end_of_its_turn(llm):
    completion = llm.chat([{"role": "user", "content": "What is the capital of France?"}], max_tokens=60)
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"
    assert "<|im_end|>" not in completion.text


PROMPT = [(7 * i) % 4000 + 300 for i in range(70)]  # some pages, and a part of one


def alone(llm: LLM) -> tuple[tuple[int, ...], list[float]]:
    completion = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=48, logprobs=1, ignore_eos=True))[0]
    return tuple(completion.token_ids), [token.logprob for token in completion.logprobs or []]


@pytest.mark.parametrize("attention_workers", [0, 1])
def test_what_ran_before_changes_no_rounding(attention_workers: int) -> None:
    """Hits in the prefix cache, and where the pages of earlier requests lay, gave one request several texts."""
    draw = random.Random(5)
    with LLM(
        "smollm2-135m", dtype="bfloat16", deterministic=True, threads=1, kv_memory="64MiB", max_model_len=512,
        attention_workers=attention_workers,
    ) as llm:  # fmt: skip
        first = alone(llm)
        assert len(first[1]) == 48
        for _ in range(2):
            others = [[draw.randrange(300, 4000) for _ in range(draw.randrange(1, 300))] for _ in range(5)]
            llm.generate([*others, PROMPT], SamplingParams(temperature=1, seed=3, max_tokens=draw.randrange(1, 60)))
            assert alone(llm) == first


def resident() -> int:
    """Resident memory of this process in KiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.fault("F29")
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_memory_pages_and_threads_stay_as_they_are():
    """Many short requests, some of them aborted: nothing grows."""
    rng = random.Random(3)
    with LLM(max_model_len=256, kv_memory="64MiB", prefix_cache=False) as llm:
        sizes = {}
        threads = 0
        for count in range(1, 2001):
            prompt = [rng.randrange(100, 40000) for _ in range(rng.randint(1, 24))]
            events = llm.stream(prompt, max_tokens=rng.randint(1, 4), n=rng.choice((1, 1, 2)), temperature=1.0)
            if rng.random() < 0.3:
                next(events)
                events.close()
            else:
                list(events)
            if count in (200, 2000):
                gc.collect()
                sizes[count], threads = resident(), threads or threading.active_count()
        llm.generate("x", max_tokens=1)
        assert threading.active_count() == threads
        assert not llm._runtime.engine._registry.requests
    assert sizes[2000] <= sizes[200] * 1.02, sizes
