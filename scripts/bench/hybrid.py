#!/usr/bin/env python3
"""A decode step of a hybrid of real layer shapes: in one process, and with its KV and states on attention workers.

    python scripts/bench/hybrid.py [--workers 1] [--value-heads 32] [--batch 8] [--context 512] [--rounds 5]
                                [--lanes 1] [--first]

The model has random weights and Qwen3-Next's layers, eight of them: six of gated DeltaNet (16 key heads, value heads
of 128 x 128) and two of attention, with dense MLPs. Both engines are measured in turns; figures are medians.
The roofline is what a step must read and write over the rate at which torch's sum reads, before each round.
Needs transformers (`pip install -e '.[any]'`), which makes the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from lamina_workers.devices.openmp import share_cores

share_cores()  # before torch is imported: idle threads of one engine would keep a core from the other's worker

import tokenizers  # noqa: E402
import torch  # noqa: E402
from cpu_time import go_first  # noqa: E402

from lamina.llm import LLM  # noqa: E402
from lamina.measure.hardware.decode_steps import measure  # noqa: E402
from lamina.system.machine import this_machine  # noqa: E402

LAYERS, HIDDEN, VOCABULARY = 8, 2048, 32_768


def make(folder: Path, value_heads: int) -> None:
    """Write the checkpoint, in bfloat16."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=5120,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        mlp_only_layers=list(range(LAYERS)),
        max_position_embeddings=32_768,
    )
    with torch.device("meta"):
        model = transformers.Qwen3NextForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    words = {f"w{index} ": index for index in range(config.vocab_size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0 ")).save(str(folder / "tokenizer.json"))


def step_bytes(folder: Path, value_heads: int, batch: int, context: int) -> int:
    """What a step must read and write: weights but the embedding, states twice, keys and values."""
    weights = (folder / "model.safetensors").stat().st_size - VOCABULARY * HIDDEN * 2
    states = LAYERS * 3 // 4 * value_heads * batch * 4 * (128 * 128 + 3 * 3 * 128)
    return weights + 2 * states + LAYERS // 4 * 2 * 2 * 256 * 2 * context * batch


def read_rate(data: torch.Tensor) -> float:
    """Bytes a second that torch's sum reads."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begun)
    return data.nbytes / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="attention workers of the second engine")
    parser.add_argument("--value-heads", type=int, default=32, help="states of a layer; a multiple of 16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lanes", type=int, help="of the second engine; as it chooses where that is not given")
    parser.add_argument("--first", action="store_true", help="go before other processes of this machine (root, Linux)")
    args = parser.parse_args()
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores; batch {args.batch}, context {args.context}")
    options = {"prefix_cache": False, "kv_memory": 2 << 30, "max_model_len": 8192}
    lanes = {} if args.lanes is None else {"lanes": args.lanes}
    rates, data = [], torch.ones(1 << 27)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.value_heads)
        moved = step_bytes(folder, args.value_heads, args.batch, args.context)
        with LLM(folder, **options) as alone, LLM(folder, attention_workers=args.workers, **options, **lanes) as split:
            if args.first:
                go_first(os.getpid())
            found: dict[str, list[float]] = {"one process": [], f"{args.workers} worker(s)": []}
            for number in range(args.rounds):
                rates.append(read_rate(data))
                for name, llm in zip(found, (alone, split), strict=True):
                    found[name].append(measure(llm, args.batch, args.context, seed=number).seconds * 1e3)
    for name, taken in found.items():
        share = statistics.median(moved / rate / (ms * 1e-3) for rate, ms in zip(rates, taken, strict=True))
        spread = f"({min(taken):.2f} to {max(taken):.2f})"
        print(f"{name:12}  {statistics.median(taken):6.2f} ms a step  {spread}, {share:.0%} of roofline")
    base, other = found.values()
    ratios = [b / a for a, b in zip(base, other, strict=True)]
    print(f"ratio         {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"roofline      {moved / 1e6:.0f} MB a step at {statistics.median(rates) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
