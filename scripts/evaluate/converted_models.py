#!/usr/bin/env python3
"""Which of transformers' causal language models Lamina runs, and how: writes docs/models.md.

    scripts/evaluate/converted_models.py [--only gemma2 phi3] [--jobs 2] [--out docs/models.md]

Of each model type a tiny random checkpoint is made, loaded as Lamina loads any folder, and its logits are compared with
transformers' in float32: a prompt at once, in chunks, and decoded tokens beside another sequence's, through a real
attention worker. Each model has a process of its own, and a time limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tiny_models
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from lamina.errors import LaminaError
from lamina.models.gguf_architectures import ARCHITECTURES
from lamina_workers.converted.decoder import ConvertedDecoder
from lamina_workers.converted.models import model_config
from lamina_workers.model_config.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 150  # seconds for one model
CLOSE = 1e-4
REASON = 66  # characters
NATIVE_GGUF = [architecture.native for architecture in ARCHITECTURES.values() if architecture.native in FAMILIES]
GGUF = {FAMILIES[native].model_type for native in NATIVE_GGUF} | {"qwen3_5", "qwen3_5_moe"}
QUANTISED = {
    "deepseek_v3": "FP8", "glm4": "FP8", "gpt_oss": "MXFP4", "llama": "FP8, MXFP4, NVFP4", "minimax_m2": "FP8",
    "olmoe": "FP8", "qwen3": "FP8", "qwen3_moe": "FP8, NVFP4", "stablelm": "FP8",
}  # fmt: skip
"""In what safetensors tests compare a model type with transformers, beside floats."""
REAL = {
    "gemma3_text": ["gemma-3-270m"],
    "llama": ["smollm2-135m"],
    "qwen2": ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"],
}
"""The aliases that are of a model type: GGUF all of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these model types, and no file is written")
    parser.add_argument("--found", type=Path, help="keep what was found here, and do not look again for what is there")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    if args.found and args.found.exists():
        found = {row["kind"]: row for row in map(json.loads, args.found.read_text().splitlines())}
    for kind in args.only or NAMES:
        if kind in found and not args.only:
            continue
        row = found[kind] = in_a_process(kind)
        print(kind, row["how"], row["why"], flush=True)
        if args.found:
            with args.found.open("a") as file:
                print(json.dumps(row), file=file)
    if not args.only:
        args.out.write_text(table([found[kind] for kind in NAMES], transformers.__version__), encoding="utf-8")


def in_a_process(kind: str) -> dict[str, Any]:
    """`examined`, in a process of its own."""
    near, far = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(kind, far))  # it has transformers already
    child.start()
    far.close()
    try:
        if near.poll(LIMIT):
            found: dict[str, Any] = json.loads(near.recv_bytes())
            return found
        return {"kind": kind, "how": "failed", "why": f"it took longer than {LIMIT} seconds"}
    except EOFError:
        return {"kind": kind, "how": "failed", "why": "its process ended"}
    finally:
        child.kill()
        child.join()


def _child(kind: str, to: Connection) -> None:
    to.send_bytes(json.dumps(examined(kind)).encode())


def examined(kind: str) -> dict[str, Any]:
    """How one model type runs, and why not, if so."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def row(how: str, why: str = "") -> dict[str, Any]:
        why = why.rpartition("It is not converted either: ")[2]  # the native families are the same for all
        return {"kind": kind, "how": how, "why": why.replace("\n", " ").replace("|", "/")[:REASON]}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            tiny_models.write_config(kind, folder)
            model_config(folder)  # what is refused by its config alone is not built
            model = tiny_models.make(kind, folder)
        except LaminaError as error:
            return row("refused", str(error))
        except Exception as error:  # noqa: BLE001  # whatever transformers says of a config that it cannot build
            return row("failed", f"no tiny checkpoint: {type(error).__name__} {error}")
        try:
            decoder = tiny_models.load(folder)
        except LaminaError as error:
            return row("refused", str(error))
        try:
            worst = tiny_models.difference(model, folder, decoder)
        except Exception as error:  # noqa: BLE001  # the table says what
            return row("failed", f"{type(error).__name__} {error}")
    if not worst < CLOSE:
        return row("failed", f"logits differ by {worst:.1e}")
    if not isinstance(decoder, ConvertedDecoder):
        return row("native", f"{worst:.0e}")
    return row("slices" if decoder.in_slices else "module", f"{worst:.0e}")


def table(rows: list[dict[str, Any]], version: str) -> str:
    """docs/models.md: the models that run, and for each reason those that do not, the most frequent reason first."""
    ways = ("native", "slices", "module", "refused", "failed")
    counts = {how: sum(row["how"].startswith(how) for row in rows) for how in ways}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["how"] in ways[3:]:
            reasons.setdefault(row["why"], []).append(row["kind"])
    ordered = sorted(reasons.items(), key=lambda reason: (-len(reason[1]), reason[1][0]))
    converted = [row for row in rows if row["how"] in ways[1:3]]
    return TEXT.format(
        version=version,
        total=len(rows),
        natives="\n".join(native_row(row["kind"], row["why"]) for row in rows if row["how"] == "native"),
        in_slices=", ".join(row["kind"] for row in rows if row["how"] == "slices"),
        modules=", ".join(row["kind"] for row in rows if row["how"] == "module"),
        quantised=" and ".join(row["kind"] for row in converted if row["kind"] in QUANTISED),
        worst=max((row["why"] for row in converted), key=float),
        others="\n".join(f"| {why} | {', '.join(kinds)} |" for why, kinds in ordered),
        **counts,
    )


def native_row(kind: str, difference: str) -> str:
    """A line of the table of native types."""
    gguf = "yes" if kind in GGUF else "no"
    return f"| {kind} | {gguf} | {QUANTISED.get(kind, '')} | {', '.join(REAL.get(kind, []))} | {difference} |"


TEXT = """# Which models run

The results of `scripts/evaluate/converted_models.py`, with transformers {version}. Lamina runs a model in one
of three ways, chosen when it is loaded:

- **native** ({native} of {total} model types): Lamina has a class for it. It needs no transformers, has tensor
  parallelism, calibration and `rope_scaling`.
- **slices** ({slices}): transformers' own code is recorded once, without weights, and cut at each attention. Needs
  `pip install -e '.[any]'`. What lives across each cut: `lamina models show MODEL --slices`.
- **module** ({module}): the forward pass cannot be recorded, since what it does depends on the tokens. transformers'
  module runs and stops at each attention. Its batches cannot go round among model workers.

Differences are the largest ones of logits from transformers' in float32, of a tiny random checkpoint. Real ones can
still be refused for what a tiny one does not have, such as heads of more than 512 numbers, which the kernels do not
keep. Remote code is never run.

Native types, and as what tests met them: **GGUF** as tiny files of llama.cpp's layout
(`lamina/models/gguf_architectures.py`; others are refused by name). **Quantised** safetensors, in which any type may
[come](packed.md#ways-to-keep-weights), were compared with transformers of those that are named. **Real file**: the
README's four, all GGUF; no real file with experts, with states, or in FP8 or FP4 was met.

| model type | GGUF | quantised | real file | difference |
| --- | --- | --- | --- | --- |
{natives}

In slices: {in_slices}.

As modules: {modules}. Differences of both are up to {worst}. In FP8 {quantised} were compared.
Of both ways only Gemma 4's text has a GGUF, whose weights are unpacked; no real file was met. Granite's experts
(`granitemoe`) are native as GGUF.

## Which do not

They are refused with these reasons ({refused}), or the tiny checkpoint could not be compared ({failed}).

| why not | model types |
| --- | --- |
{others}
"""


if __name__ == "__main__":
    main()
