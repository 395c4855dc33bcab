"""The real model, end to end, against transformers on the same weights."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from model_export import export
from real_models import token_prompts

import lamina
from lamina import LLM, EngineError, InvalidRequest, SamplingParams
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
def tokenizer(path):
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return token_prompts(tokenizer, 2000)


@pytest.fixture(scope="module")
def reference(unpacked):
    return transformers.AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(reference, prompts):
    """64 greedy tokens of each prompt, cut where the two likeliest logits first come within 1e-4 of each other."""
    answers = []
    for prompt in prompts:
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tied = len(out.logits)
        for i, logits in enumerate(out.logits):
            first, second = logits[0].topk(2).values
            if first - second < 1e-4:
                tied = i
                break
        answers.append(out.sequences[0, len(prompt) :].tolist()[:tied])
    return answers


@pytest.mark.timeout(900)
def test_greedy_tokens_equal_transformers_one_by_one_and_together(path, prompts, expected):
    with LLM(path, weights="float32", max_batch_tokens=256, kv_memory="1GiB") as llm:
        params = SamplingParams(max_tokens=64, ignore_eos=True)
        together = llm.generate(prompts, params)
        again = llm.generate(prompts[-1:], params)
        assert again[0].usage.cached_tokens > 1900
        alone = [llm.generate(prompt, params) for prompt in prompts[:3]]
    for completions in (together, alone, again):
        wanted = expected[-1:] if completions is again else expected
        for completion, tokens in zip(completions, wanted, strict=False):
            assert list(completion.token_ids[: len(tokens)]) == tokens


@pytest.mark.timeout(900)
def test_bfloat16_agrees_with_float32_as_often_as_transformers_does(path, unpacked, reference, prompts):
    from lamina.measure.probe import Probe
    from lamina_protocols.messages.layers import HolderConfig
    from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
    from lamina_workers.decoder.model import Decoder
    from lamina_workers.model_config.config import ModelConfig

    prompt = prompts[-1]
    half = transformers.AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact = reference(torch.tensor([prompt])).logits[0].argmax(-1)
        theirs = half(torch.tensor([prompt])).logits[0].argmax(-1)
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


def test_stream_and_generate_agree(llm):
    whole = llm.generate("The sky is", max_tokens=20, ignore_eos=True)
    assert "".join(event.text for event in llm.stream("The sky is", max_tokens=20, ignore_eos=True)) == whole.text
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == whole.usage.completion_tokens == 20


def test_chat_stops_at_the_end_of_its_turn(llm):
    completion = llm.chat([{"role": "user", "content": "What is the capital of France?"}], max_tokens=60)
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"
    assert "<|im_end|>" not in completion.text


def test_a_stop_string_ends_the_text_before_it(llm):
    free = llm.generate("1, 2, 3, 4,", max_tokens=24)
    stopped = llm.generate("1, 2, 3, 4,", max_tokens=24, stop=" 9")
    assert " 9" in free.text
    assert stopped.text == free.text[: free.text.index(" 9")]
    assert stopped.finish_reason == "stop"


def test_stopping_the_iteration_aborts(llm):
    events = llm.stream("Once", max_tokens=900, ignore_eos=True)
    next(events)
    events.close()
    llm.generate("x", max_tokens=1)
    assert not llm._runtime.engine._registry.requests


def test_a_stream_that_is_never_started_computes_nothing(llm):
    events = llm.stream("Once", max_tokens=900, ignore_eos=True)
    llm.generate("x", max_tokens=1)
    assert not llm._runtime.engine._registry.requests
    events.close()


def test_bad_arguments_of_a_stream_raise_at_once(llm):
    for method in (llm.stream, llm.astream):
        with pytest.raises(InvalidRequest, match="top_p"):
            method("x", top_p=7)


def test_a_closed_llm_says_so(path):
    llm = LLM(path, kv_memory="64MiB", max_model_len=128)
    llm.close()
    llm.close()
    for use in (lambda: llm.generate("x"), lambda: llm.stream("x"), lambda: llm.model_path):
        with pytest.raises(EngineError, match="closed"):
            use()
    assert not llm.alive


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_memory": "1KiB"}, "kv_memory is 1024 bytes; allowed are 737280"),
        ({"kv_memory": "1PiB"}, "kv_memory is"),
        ({"kv_memory": "many"}, "kv_memory is 'many'"),
        ({"max_model_len": 9000}, "the model's context is 8192"),
        ({"max_model_len": 8000, "kv_memory": "64MiB"}, "holds 2912 tokens"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"page_size": 33}, "page_size is 33"),
        ({"threads": 0}, "threads is 0"),
        ({"rope_scaling": {"rope_type": "mystery"}}, "mystery"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"colour": "red"}, "unknown keyword 'colour'"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_loaded(path, settings, message):
    with pytest.raises(InvalidRequest, match=message):
        LLM(path, **settings)


def test_async_twins_and_threads_give_the_same(llm):
    expected = llm.generate(["One", "Two", "Three"], max_tokens=8)

    async def use() -> None:
        assert [c.text for c in await llm.agenerate(["One", "Two", "Three"], max_tokens=8)] == [
            c.text for c in expected
        ]
        text = [event.text async for event in llm.astream("One", max_tokens=8)]
        assert "".join(text) == expected[0].text

    asyncio.run(use())
    got = [""] * 3

    def call(i: int) -> None:
        got[i] = llm.generate(["One", "Two", "Three"][i], max_tokens=8).text

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [c.text for c in expected]


def test_logprobs_have_the_chosen_token_on_top_when_greedy(llm):
    completion = llm.generate("The capital of France is", max_tokens=3, logprobs=2)
    assert completion.logprobs is not None
    for entry in completion.logprobs:
        assert entry.top[0].token_id == entry.token_id
        assert entry.top[0].logprob == entry.logprob >= entry.top[1].logprob
    assert "".join(entry.text for entry in completion.logprobs) == completion.text


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        ("x", {"max_tokens": 5000}, "length is 1024 tokens"),
        ([1] * 1020, {"max_tokens": 5}, "length is 1024 tokens"),
        ("bad \ud800 text", {}, "surrogate"),
        ([49152], {}, "49151"),
        ([-1], {}, "0 to 49151"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"top_p": 2}, "top_p"),
        ("x", {"n": 0}, "n is 0"),
        ("x", {"n": 10**9}, "n is 1000000000"),
        ("x", {"seed": 2**70}, "seed"),
        ("x", {"stop": ""}, "stop"),
        ("x", {"stop_token_ids": [99999]}, "stop_token_ids has token id 99999"),
        ("x", {"logit_bias": {60000: 1}}, "60000"),
        ("x", {"temprature": 1}, "temperature"),
        (7, {}, "prompts is 7"),
        ("x", {"priority": "high"}, "priority"),
    ],
)
def test_bad_input_is_refused_and_the_next_request_works(llm, prompts, options, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        llm.generate(prompts, **options)
    assert isinstance(caught.value, ValueError)
    assert len(llm.generate("ok", max_tokens=2, ignore_eos=True).token_ids) == 2


def test_the_module_keeps_its_model(path):
    first = lamina.generate("One plus one is", model=path, max_tokens=4)
    kept = lamina.api._kept
    second = lamina.generate(["One plus one is"], SamplingParams(max_tokens=4), model=path)
    one, (same, other) = lamina.embed("One", model=path), lamina.embed(["One", "Two"], model=path)
    assert lamina.api._kept is kept
    assert [first.text] == [c.text for c in second]
    alike, unlike = (sum(a * b for a, b in zip(one.embedding, e.embedding, strict=True)) for e in (same, other))
    assert alike > 0.999 > unlike
    lamina.close()
    assert lamina.api._kept is None
