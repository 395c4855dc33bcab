"""Runs in an environment that has vLLM: `python vllm_texts.py MODEL BLOCKS [NAME=JSON ...]`. Prints the greedy tokens
of prompts with shared prefixes, in two halves, each a line of JSON, then the five highest log probabilities at each
token of one of several chunks. BLOCKS is how many blocks there are, so that some sequences are preempted. The names are
further arguments of `LLM`; `adapter="FOLDER"` is a LoRA adapter that every other prompt has."""

from __future__ import annotations

import json
import os
import random
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"} | {
    name: os.environ.get(name, "0") for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING")
}


def main(model: str, blocks: int, *options: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    sizes = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 96, "block_size": 32}
    plain = {"dtype": "float32", "skip_tokenizer_init": True, "enable_prefix_caching": True, "enforce_eager": True}
    changes = {name: json.loads(value) for name, _, value in (option.partition("=") for option in options)}
    adapter = LoRARequest("adapter", 1, changes.pop("adapter")) if "adapter" in changes else None
    llm = LLM(model, **{**sizes, **plain, "num_gpu_blocks_override": blocks, **changes})
    draw = random.Random(0)
    prefixes = [[draw.randrange(10, 500) for _ in range(length)] for length in (0, 70, 130)]
    prompts = [
        draw.choice(prefixes) + [draw.randrange(10, 500) for _ in range(draw.randrange(3, 80))] for _ in range(64)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    for half in (prompts[:32], prompts[32:]):
        adapters = [adapter if number % 2 else None for number in range(len(half))]
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in half]
        outputs = llm.generate(inputs, sampling, use_tqdm=False, lora_request=adapters)
        print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)  # noqa: T201
    long = TokensPrompt(prompt_token_ids=[draw.randrange(10, 500) for _ in range(300)])
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=5, prompt_logprobs=5, detokenize=False)
    (answer,) = llm.generate([long], sampling, use_tqdm=False)
    tops = [*(answer.prompt_logprobs or [])[1:], *(answer.outputs[0].logprobs or [])]
    print(json.dumps([[[token, entry.logprob] for token, entry in top.items()] for top in tops]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
