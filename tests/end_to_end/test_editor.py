"""An editor at the whole server, with a model of code: the gap is filled and nothing more, by /infill as llama.vim asks
for it, by `suffix`, and by a prompt with the model's own tokens as Continue writes it."""

from __future__ import annotations

import pytest
from evaluate.fault_injection.server import serving
from real_models import fetched

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

MODEL = "qwen2.5-coder-1.5b"
AHEAD = """def quicksort(arr):
    if len(arr) <= 1:
        return arr
    pivot = arr[len(arr) // 2]
    """
BEHIND = """
    middle = [x for x in arr if x == pivot]
    right = [x for x in arr if x > pivot]
    return quicksort(left) + middle + quicksort(right)
"""
GAP = "left = [x for x in arr if x < pivot]"


def test_a_gap_in_code_is_filled_and_ends() -> None:
    fetched(MODEL)
    with serving("--kv-memory", "256MiB", "--deterministic", model=MODEL) as server:
        gap = {"input_prefix": AHEAD, "input_suffix": BEHIND, "n_predict": 48, "temperature": 0}
        asked = gap | {"id_slot": 0, "input_extra": [], "prompt": "", "stream": False, "cache_prompt": True}
        status, answer = server.post("/infill", **asked, samplers=["infill"], t_max_predict_ms=1000)
        assert (status, answer["stop_type"]) == (200, "eos"), (answer, server.log)
        assert answer["content"].strip() == GAP
        written = f"<|fim_prefix|>{AHEAD}<|fim_suffix|>{BEHIND}<|fim_middle|>"
        for fields in ({"prompt": AHEAD, "suffix": BEHIND}, {"prompt": written}):
            status, completion = server.post("/v1/completions", **fields, max_tokens=48, temperature=0)
            [choice] = completion["choices"]
            assert (status, choice["text"], choice["finish_reason"]) == (200, answer["content"], "stop")
