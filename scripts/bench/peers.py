"""Other engines that benchmarks measure. Each imports its library when it is made, so that any Python runs this file.

Each is a function of a model and the options of the run that gives a `Run`: prompts of token ids and how many tokens
each, to the seconds at which each prompt's tokens came. Decoding is greedy, and the end of the text is ignored.
Prompts of one call have equal lengths. With two cores, each peer computes on two threads.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Times = list[list[float]]  # of each prompt: when each of its tokens came
CONTEXT = 8192  # the most tokens that all sequences of a call have together, where a peer allocates KV when it loads
SEQUENCES = 8


class Decoded(NamedTuple):
    """What happened between two batches while every sequence decoded, `steps` steps. Seconds: `cpu` of the engine's
    process, user and system, `workers_cpu` of its children, `plan` and `announce` of the engine's statistics (None
    where it has none)."""

    steps: float
    cpu: float
    workers_cpu: float
    plan: float | None
    announce: float | None


class Answer(NamedTuple):
    """When tokens came, in seconds from the beginning, and what was counted meanwhile, where the engine can."""

    times: Times
    decoded: Decoded | None = None


Run = Callable[[list[list[int]], int], Answer]


class Options(NamedTuple):
    """Of the engines of one run. `keep`: the KV of prompts is kept, so a prompt that comes again only decodes. `lanes`
    0: as the engine chooses. `first`: its processes go before others of the machine. `query_first` as in a config."""

    attention_workers: int = 0
    shard: str = "heads"
    lanes: int = 1
    keep: bool = False
    first: bool = False
    query_first: str = "never"


LIBRARIES = {
    "hf": ("torch", "transformers"),
    "vllm": ("torch",),  # `vllm` itself must be imported without this folder on the path
    "llamacpp": ("llama_cpp",),
    "ik": ("ik_llama_cpp._ctypes_api",),
    "xllamacpp": ("xllamacpp",),
    "openvino": ("openvino", "openvino_genai"),
    "pace": ("torch", "pace.llm"),
}
"""What a peer imports, so that the memory of its libraries can be told from that of a model."""


def hf(model: str, options: Options) -> Run:
    """transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    @torch.no_grad()
    def run(ids: list[list[int]], n: int) -> Answer:
        out = net(torch.tensor(ids), use_cache=True, logits_to_keep=1)
        times = [time.perf_counter()]
        for _ in range(n - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = net(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter())
        return Answer([times] * len(ids))

    return run


def vllm(model: str, options: Options) -> Run:
    """vLLM's CPU backend, in one process."""
    sys.path[:] = [each for each in sys.path if each != str(Path(__file__).parent)]  # has a `kernels`, as PyPI has
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{cores() - 1}")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=8192, max_num_seqs=16, enable_prefix_caching=options.keep)

    def run(ids: list[list[int]], n: int) -> Answer:
        params = SamplingParams(max_tokens=n, ignore_eos=True, temperature=0)
        times: Times = [[] for _ in ids]
        engine = llm.llm_engine
        for number, prompt in enumerate(ids):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if len(output.outputs[0].token_ids) > len(times[int(output.request_id.split("-")[0])]):
                    times[int(output.request_id.split("-")[0])].append(time.perf_counter())
        return Answer(times)

    return run


class LlamaBatches:
    """llama.cpp's own batches, of a context with up to `SEQUENCES` sequences. The likeliest tokens are taken by
    numpy. library: llama_cpp, or ik_llama.cpp's, which lacks some of it."""

    def __init__(self, model: str, library: str) -> None:
        import numpy as np

        llama_cpp = importlib.import_module(library)
        self._llama, self._numpy = llama_cpp, np
        # The package's own context has one sequence; only its loading of the model is used.
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max, wanted.n_batch = CONTEXT, SEQUENCES, 2048
        wanted.n_threads = wanted.n_threads_batch = cores()
        if library == "llama_cpp":
            wanted.flash_attn_type = 1
            wanted.kv_unified = True  # sequences share the room, so one may have all of it
        else:
            wanted.flash_attn = True
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(CONTEXT, 0, 1)

    def forget(self) -> None:
        """Forget all sequences."""
        if hasattr(self._llama, "llama_memory_clear"):
            self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)
        else:
            self._llama.llama_kv_cache_clear(self._context)

    def decode(self, rows: list[tuple[int, int, list[int]]]) -> list[int]:
        """Feed tokens of sequences, each (sequence, position of the first, tokens). Returns the likeliest token after
        each."""
        batch, count, last = self._batch, 0, []
        for sequence, position, tokens in rows:
            for offset, token in enumerate(tokens):
                batch.token[count], batch.pos[count] = token, position + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = offset == len(tokens) - 1
                count += 1
            last.append(count - 1)
        batch.n_tokens = count
        if status := self._llama.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode of {count} tokens gave {status}")
        pointers = (self._llama.llama_get_logits_ith(self._context, row) for row in last)
        numbers = (self._numpy.ctypeslib.as_array(pointer, (self._vocabulary,)) for pointer in pointers)
        return [int(each.argmax()) for each in numbers]


def llamacpp(model: str, options: Options, library: str = "llama_cpp") -> Run:
    """llama.cpp by llama-cpp-python: prompts one after another, then all sequences in one batch a step."""
    llama = LlamaBatches(model, library)

    def run(ids: list[list[int]], n: int) -> Answer:
        llama.forget()
        times: Times = []
        tokens = []
        for number, prompt in enumerate(ids):
            tokens += llama.decode([(number, 0, prompt)])
            times.append([time.perf_counter()])
        position = len(ids[0])
        for step in range(n - 1):
            tokens = llama.decode([(number, position + step, [token]) for number, token in enumerate(tokens)])
            for own in times:
                own.append(time.perf_counter())
        return Answer(times)

    return run


def ik(model: str, options: Options) -> Run:
    """ik_llama.cpp by ik-llama-cpp-python, in the same way."""
    return llamacpp(model, options, "ik_llama_cpp._ctypes_api")


def xllamacpp(model: str, options: Options) -> Run:
    """llama.cpp's server by xllamacpp, whose wheel is made for processors without AVX512."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.kv_unified = CONTEXT, SEQUENCES, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores()
    params.cache_prompt, params.cache_ram_mib = options.keep, 0
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def run(ids: list[list[int]], n: int) -> Answer:
        times: Times = [[] for _ in ids]

        def complete(number: int) -> None:
            request = {"prompt": ids[number], "max_tokens": n, "temperature": 0, "ignore_eos": True, "stream": True}
            server.handle_completions(request, lambda chunk: times[number].append(time.perf_counter()))

        threads = [threading.Thread(target=complete, args=(number,)) for number in range(len(ids))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Answer([own[:n] for own in times])  # the last chunk says only that the text has ended

    return run


def openvino(model: str, options: Options) -> Run:
    """OpenVINO GenAI's continuous batching, of a GGUF file or a folder in its own format."""
    import numpy as np
    import openvino_genai as genai
    from openvino import Tensor

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.cache_size, scheduler.enable_prefix_caching = SEQUENCES, 2, options.keep
    pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": cores()})

    def run(ids: list[list[int]], n: int) -> Answer:
        config = genai.GenerationConfig(max_new_tokens=n, ignore_eos=True)
        times: Times = [[] for _ in ids]
        handles = [pipe.add_request(i, Tensor(np.array([each], np.int64)), config) for i, each in enumerate(ids)]
        while pipe.has_non_finished_requests():
            pipe.step()
            for own, handle in zip(times, handles, strict=True):
                while handle.can_read():
                    own.extend([time.perf_counter()] * sum(len(o.generated_ids) for o in handle.read().values()))
        return Answer([own[:n] for own in times])

    return run


def pace(model: str, options: Options) -> Run:
    """AMD PACE, which computes in bfloat16."""
    import torch

    torch.set_num_threads(cores())
    from pace.llm import LLMModel, SamplingConfig
    from pace.llm.attention import KVCacheType

    llm = LLMModel(model, kv_cache_type=KVCacheType.SLAB_POOL, disable_tqdm=True)

    class Clock:
        """Notes when tokens come; the first call brings the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, tokens: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is kept back."""

    def run(ids: list[list[int]], n: int) -> Answer:
        clock = Clock()
        config = SamplingConfig(max_new_tokens=n, min_new_tokens=n, ignore_eos=True, do_sample=False)
        llm.generate(torch.tensor(ids), config, clock)
        return Answer([clock.times[1:]] * len(ids))

    return run


PEERS: dict[str, Callable[[str, Options], Run]] = {
    "hf": hf,
    "vllm": vllm,
    "llamacpp": llamacpp,
    "ik": ik,
    "xllamacpp": xllamacpp,
    "openvino": openvino,
    "pace": pace,
}


def cores() -> int:
    return len(os.sched_getaffinity(0))
