#!/usr/bin/env python3
"""lm-evaluation-harness's log-likelihoods through a server beside those of transformers, both in float32.

    pip install 'lm-eval[api]' transformers accelerate
    scripts/evaluate/harness_logprobs.py [--model smollm2-135m] [--items 100]

An item is a piece of a text and how it goes on. The harness asks `lamina serve` through its `local-completions`, once
by token ids and once by text, and its own `hf` model. Printed is the largest difference of each way.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

sys.path.append(str(Path(__file__).parents[1]))  # behind this folder and what is installed
from model_export import export

from lamina.models.resolve import resolve

CLOSE = 1e-3
STARTING = 300  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--port", type=int, default=18765)
    args = parser.parse_args()
    asked = items(args.items)
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(resolve(args.model), Path(temporary) / "model", torch.float32)
        wanted = timed("transformers", HFLM(str(folder), dtype="float32", device="cpu", batch_size=1), asked)
        command = [sys.executable, "-m", "lamina", "serve", str(folder), "--port", str(args.port)]
        server = subprocess.Popen([*command, "--served-model-name", "model", "--weights", "float32"])
        try:
            wait_for(f"http://127.0.0.1:{args.port}/health", server)
            close = True
            for tokenized in (True, False):
                way = LocalCompletionsAPI(
                    base_url=f"http://127.0.0.1:{args.port}/v1/completions",
                    model="model",
                    tokenizer=str(folder),
                    tokenizer_backend="huggingface",
                    tokenized_requests=tokenized,
                    num_concurrent=8,
                )
                name = "server, token ids" if tokenized else "server, text"
                found = timed(name, way, asked)
                worst = max(abs(f - w) for (f, _), (w, _) in zip(found, wanted, strict=True))
                greedy = sum(f == w for (_, f), (_, w) in zip(found, wanted, strict=True))
                close &= worst <= CLOSE
                print(json.dumps({"way": name, "worst_difference": worst, "same_greedy": greedy, "items": len(asked)}))
        finally:
            server.terminate()
            server.wait(30)
    return 0 if close else 1


def items(count: int) -> list[Instance]:
    """Pieces of Python's help, each with how it goes on."""
    words = " ".join(" ".join(text.split()) for _, text in sorted(pydoc_data.topics.topics.items())).split()
    found = []
    for number in range(count):
        at, length = number * 97, 5 + number % 60
        context, after = words[at : at + length], words[at + length : at + length + 1 + number % 12]
        pair = " ".join(context), " " + " ".join(after)
        found.append(Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number))
    return found


def timed(name: str, model: Any, asked: Sequence[Instance]) -> list[tuple[float, bool]]:
    began = time.perf_counter()
    found: list[tuple[float, bool]] = model.loglikelihood(list(asked), disable_tqdm=True)
    print(f"{name}: {len(asked)} items in {time.perf_counter() - began:.1f} s", flush=True)
    return found


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + STARTING
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit("the server does not serve")


if __name__ == "__main__":
    sys.exit(main())
