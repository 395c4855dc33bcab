#!/usr/bin/env python3
"""What KV policies cost in quality at long contexts, beside the full cache of the same run:

    scripts/evaluate/long_context.py --context 8192 --policies auto "streaming(sink=64, recent=256)" --out eval/

A prompt is a real text with pass keys, pairs of words and a piece of code hidden in it. It is prefilled once; each task
is a fork of it, whose tokens are given one decode step at a time, so that policies choose as they do when serving:

- text: how the text goes on; code: the hidden piece of code once more; switch: passages from many places of the text
- passkeys: the hidden keys, at many depths; recall: the values of the pairs (MQAR, arXiv 2312.04927)
- changes: keys and pairs mixed, with 0 to 7 other tokens between, so that the place needed changes from step to step

Of each task: NLL beside full's, top-1 agreement, KL(full || policy), answers of those that full gives, and by the
attention worker's count the bytes read and pages held, and the attention mass missed by estimate.

With --kept the prompts' K and V, and what full predicts, stay in that folder and are not computed again; policies that
do not read prompts whole prefill them themselves. The policy `full` in the list is then the noise floor. With --heads,
each head's output is also compared with exact attention in float32. Into --out go results.json and pictures.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation import tasks
from evaluation.heads import Fidelity, read_heads
from evaluation.kept_kv import KeptKV
from evaluation.running import Outcome, held_share, keep, known, missed_share, read_share, read_tasks
from evaluation.suite import ALL, Compared, compare
from evaluation.tasks import Prompt

from lamina.config import DEFAULT_MODEL, DTYPES, KV_DTYPES, EngineConfig
from lamina.errors import LaminaError
from lamina.launch.kv_sizing import holder_config
from lamina.measure.probe import Probe, loaded
from lamina.models.resolve import resolve
from lamina.policy_file import head_policies
from lamina.system.machine import native_dtype, this_machine
from lamina.text.tokenizer import Tokenizer
from lamina_workers.attention_worker.page_layout import attention_kernels
from lamina_workers.checkpoints.model_checkpoint import fingerprint
from lamina_workers.model_config.config import ModelConfig

import torch  # isort: skip  # after lamina, which sets up its threads
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

COLUMNS = ("NLL", "full", "change", "±", "top-1", "KL", "worst", "found", "read", "held", "missed", "worst")


def main() -> None:
    args = parsed()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    try:
        evaluate(args, console)
    except LaminaError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a prompt and what follows it")
    parser.add_argument("--policies", nargs="*", default=["auto"], help="beside full")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS)
    parser.add_argument("--text", type=Path, help="a text file; without one, Python's own help topics")
    parser.add_argument("--texts", type=int, default=1, help="prompts, each from another place of the text")
    parser.add_argument("--steps", type=int, default=192, help="tokens of text, code and switch")
    parser.add_argument("--depths", type=int, default=12, help="pass keys, from the first to the last part of a prompt")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of words of recall")
    parser.add_argument("--heads", type=int, default=0, metavar="STEPS", help="compare each head's output in so many")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--kv-dtype", default="auto", choices=KV_DTYPES)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prompt at a time")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=Path, help="a folder for the K and V of prompts, which other runs may share")
    parser.add_argument("--out", type=Path, help="a folder for results and pictures")
    args = parser.parse_args()
    for name, least in (("texts", 1), ("steps", 2), ("depths", 1), ("pairs", 1), ("chunk", 8), ("heads", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; allowed is {least} or more")
    return args


def evaluate(args: argparse.Namespace, console: Console) -> None:
    path = resolve(args.model)
    model, print_of = ModelConfig.from_folder(path), fingerprint(path)
    policies = list(dict.fromkeys(args.policies))
    for policy in policies:  # a wrong one fails before the first has run
        head_policies(policy, model.attention_layers, model.num_key_value_heads, print_of)
    scaling = yarn(model, args.context)
    said = about(args, print_of, scaling)
    where = f"{args.model}, {args.context} tokens, {said['dtype']}"
    console.print(f"{where}; {said['processor']}, {said['threads']} threads")
    results: dict[str, dict[str, Compared]] = {}
    heads: dict[str, Fidelity] = {}
    with Progress(console=console, transient=True) as progress, kept_in(args.kept) as folder:
        named = ("fingerprint", "rope_scaling", "dtype", "chunk")
        kept = KeptKV(folder, json.dumps([said[name] for name in named]))
        for name, compared, fidelity, seconds in measured(args, policies, kept, scaling, progress):
            results[name] = compared
            heads |= {name: fidelity} if fidelity is not None else {}
            console.print(f"{short(name)}: {seconds:.0f} s")
            if args.out is not None:
                write(args.out, said, results, heads)  # each time: the next one may not end well
    console.print(table(results))
    if args.out is not None:
        draw(results, heads, where, args.out)
        console.print(f"written into {args.out}")


@contextmanager
def load(args: argparse.Namespace, policy: str, scaling: Any) -> Iterator[tuple[Probe, Tokenizer]]:
    """The model, set up as `LLM(name, policy=policy, ...)` would, and its tokenizer."""
    machine = this_machine()
    config = EngineConfig(
        dtype=args.dtype, kv_dtype=args.kv_dtype, threads=args.threads, rope_scaling=scaling, policy=policy
    )
    with loaded(args.model, config) as (path, model, decoder, tokenizer):
        holder = holder_config(path, model, replace(config, kv_memory=1 << 50), decoder.dtype, machine)
        most = args.context + len(tasks.TASKS) * (2 * args.steps + 1024)
        each = sum(spec.kv_heads * (spec.key_width + spec.own_v) for spec in holder.layers) * 4
        holder = replace(holder, kv_memory=most * each)  # four bytes a number, with sketches and pages not full
        yield Probe(model, decoder, holder, config.threads or machine.cores), tokenizer


@contextmanager
def kept_in(folder: Path | None) -> Iterator[Path]:
    """The folder for the K and V of prompts; without one, for this run alone."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def measured(
    args: argparse.Namespace, policies: Sequence[str], kept: KeptKV, scaling: Any, progress: Progress
) -> Iterator[tuple[str, dict[str, Compared], Fidelity | None, float]]:
    """Each policy beside the full cache, and the seconds that it took."""

    def through(probe: Probe, name: str, prompts: Sequence[Prompt]) -> list[dict[str, Outcome]]:
        task = progress.add_task(short(name), total=sum(prompt.tokens_fed for prompt in prompts))
        done = [read_tasks(probe, kept, p, args.chunk, lambda n: progress.advance(task, n)) for p in prompts]
        progress.remove_task(task)
        return done

    with load(args, "full", scaling) as (probe, tokenizer):
        prompts = make_prompts(args, tokenizer)
        full = []
        for prompt in prompts:
            own = known(kept, prompt, args.kv_dtype)
            if own is None:
                (own,) = through(probe, "full", [prompt])
                keep(kept, prompt, args.kv_dtype, own)
            full.append(own)
    for policy in policies:
        with load(args, policy, scaling) as (probe, _):
            begun = time.perf_counter()
            compared = compare(prompts, full, through(probe, policy, prompts))
            fidelity = None
            if args.heads:
                fidelity = read_heads(probe, prompts[0].tokens, args.heads, lambda tokens: None, args.chunk)
        yield policy, compared, fidelity, time.perf_counter() - begun


def yarn(model: ModelConfig, context: int) -> dict[str, Any] | None:
    """RoPE scaling for contexts longer than the model's."""
    made_for = model.max_position_embeddings
    if context <= made_for:
        return None
    return {"rope_type": "yarn", "factor": context / made_for, "original_max_position_embeddings": made_for}


def make_prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """As many prompts as were asked for, in the model's tokens, from places spread over the text."""

    def encode(text: str) -> list[int]:
        return [token for token in tokenizer.encode(text) if token not in tokenizer.special_ids]

    text = encode(args.text.read_text() if args.text else "\n\n".join(pydoc_data.topics.topics.values()))
    last, begin = max(0, len(text) - args.context), tokenizer.encode("")[:1]
    return [
        tasks.make_prompt(
            encode,
            begin,
            text[last * at // max(1, args.texts - 1) :],
            args.context,
            args.steps,
            args.depths,
            args.pairs,
            args.tasks,
            args.seed + at,
        )
        for at in range(args.texts)
    ]


def about(args: argparse.Namespace, print_of: str, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """What the results are of, for the file."""
    machine = this_machine()
    given = {name: getattr(args, name) for name in sorted(vars(args)) if name not in ("out", "kept", "policies")}
    return given | {
        "text": args.text.name if args.text else "pydoc topics",
        "fingerprint": print_of,
        "rope_scaling": scaling,
        "dtype": native_dtype(machine)[0] if args.dtype == "auto" else args.dtype,
        "threads": args.threads or machine.cores,
        "processor": machine.processor,
        "cores": machine.cores,
        "memory": machine.memory,
        "kernels": attention_kernels().__name__.rsplit(".", 1)[-1],
        "torch": torch.__version__,
    }


def write(
    out: Path, said: Mapping[str, Any], results: Mapping[str, Mapping[str, Compared]], heads: Mapping[str, Fidelity]
) -> None:
    """results.json."""
    out.mkdir(parents=True, exist_ok=True)
    written = {
        "about": said,
        "results": {name: {task: of.as_json() for task, of in by.items()} for name, by in results.items()},
        "heads": {name: of.as_json() for name, of in heads.items()},
    }
    (out / "results.json").write_text(json.dumps(written, indent=1) + "\n")


def short(name: str) -> str:
    """A policy's name for tables and pictures: a file without its folders."""
    return Path(name).name if name.endswith(".toml") else name.replace(" ", "") if "(" in name else name


def table(results: Mapping[str, Mapping[str, Compared]]) -> Table:
    """By task, a row a policy."""
    shown = Table(title="beside full; missed is the attention mass not read, by estimate: mean and worst query")
    shown.add_column("task (tokens)")
    shown.add_column("policy", overflow="fold")
    for column in COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for task in next(iter(results.values())):
        for number, (name, by) in enumerate(results.items()):
            of = by[task]
            first = f"{task} ({of.quality.tokens})" if number == 0 else ""
            shown.add_row(first, short(name), *cells(of), end_section=number == len(results) - 1)
    return shown


def cells(of: Compared) -> list[str]:
    text, score, usage = of.quality, of.score, of.usage
    error = text.error / text.full_nll if text.full_nll > 0 else 0.0
    return [
        f"{text.nll:.4f}",
        f"{text.full_nll:.4f}",
        f"{text.relative:+.2%}",
        f"{error:.2%}",
        f"{text.agreement:.1%}",
        f"{text.divergence:.4f}",
        f"{text.worst:.2f}",
        f"{score.kept}/{score.full}/{score.asked}" if score.asked else "",
        f"{read_share(usage):.3f}",
        f"{held_share(usage):.3f}",
        f"{missed_share(usage):.4f}" if usage.queries else "",
        f"{usage.worst:.3f}" if usage.queries else "",
    ]


def draw(results: Mapping[str, Mapping[str, Compared]], heads: Mapping[str, Fidelity], where: str, out: Path) -> None:
    """Quality over what was read and held, one point a policy, and every head's fidelity."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: they need matplotlib, pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw_quality(pyplot, {name: by[ALL] for name, by in results.items()}, where, out / "quality.png")
    if heads:
        draw_heads(pyplot, heads, where, out / "heads.png")


def draw_quality(pyplot: Any, results: Mapping[str, Compared], where: str, file: Path) -> None:
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex="col", sharey="row", layout="constrained")
    colours, markers = pyplot.get_cmap("tab10").colors, "osD^v<>P*X"
    for number, (name, of) in enumerate(results.items()):
        text = of.quality
        style = {"color": colours[number % 10], "marker": markers[number % len(markers)], "linestyle": "none"}
        for column, share in enumerate((read_share(of.usage), held_share(of.usage))):
            relative = 100 / text.full_nll if text.full_nll > 0 else 0.0
            label = short(name) if column == 0 else None
            axes[0, column].errorbar(share, 100 * text.relative, yerr=text.error * relative, label=label, **style)
            axes[1, column].plot(share, 100 * text.agreement, **style)
    axes[0, 0].set_ylabel("change of NLL, %  (bars: standard error)")
    axes[1, 0].set_ylabel("top-1 agreement with full, %")
    for column, name in enumerate(("KV read in decode", "KV held")):
        axes[0, column].axhline(0, color="grey", linewidth=0.8)
        axes[1, column].set_xlabel(f"{name}, share of the full cache's")
        axes[1, column].set_xlim(0, 1.05)
    if max(100 * abs(of.quality.relative) for of in results.values()) > 10:
        axes[0, 0].set_yscale("symlog", linthresh=1)
        axes[0, 0].yaxis.set_major_formatter("{x:g}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(where)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def draw_heads(pyplot: Any, heads: Mapping[str, Fidelity], where: str, file: Path) -> None:
    shown = {name: of.cosine for name, of in heads.items()}
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    size = (2.2 + 2.6 * across, 0.6 + 5 * down)
    figure, axes = pyplot.subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (name, cosine) in zip(axes.flat, shown.items(), strict=False):
        image = axis.imshow(cosine.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_title(short(name), fontsize=8, wrap=True)
        axis.set_xlabel("query head")
    for row in axes:
        row[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes.ravel().tolist(), label="cosine of a head's output and exact attention's")
    figure.suptitle(where, fontsize=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
