"""Runs in an environment that has vLLM: `python vllm_texts.py MODEL BLOCKS`. Prints the greedy tokens of prompts with
shared prefixes as one line of JSON; BLOCKS is how many blocks there are, so that some sequences are preempted."""

from __future__ import annotations

import json
import os
import random
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def main(model: str, blocks: int) -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        block_size=32,
        num_gpu_blocks_override=blocks,
        enable_prefix_caching=True,
        enforce_eager=True,
    )
    draw = random.Random(0)
    prefixes = [[draw.randrange(10, 500) for _ in range(length)] for length in (0, 70, 130)]
    prompts = [
        draw.choice(prefixes) + [draw.randrange(10, 500) for _ in range(draw.randrange(3, 80))] for _ in range(64)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
