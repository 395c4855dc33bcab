#!/usr/bin/env python3
"""What KV policies cost in quality at long contexts, always beside the full cache of the same run:

    scripts/evaluate/long_context.py --context 8192 --policies "streaming(sink=64, recent=256)" auto --out eval/

- text: a text's prompt is prefilled, then its next tokens are fed one decode step at a time, so that policies choose as
they do when serving. Change of NLL, KL(full || policy), top-1 agreement with full. - passkey, needle: five digits at
several depths, continued greedily, right if all five are; copying: random tokens twice; recall: `The key is value.` for
eight pairs (MQAR), asked for in another order. - heads: each head's output beside exact attention in float32 over the
same queries, keys and values: cosine, and the attention mass of the keys that it saw, where these depend on positions
alone.

Only answers that the full cache gives are counted, and a task of which it gives less than --gate is not counted at all.
The first row is full once more with its prompts cut into other chunks: the noise floor of the dtype. Read and held are
shares of what full reads in decode, and keeps, on the texts. Into the folder --out go results.json, quality.png and,
with heads, heads.png.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation import tasks
from evaluation.measures import Score
from evaluation.running import Limits, Total
from evaluation.suite import Comparison, Run, Suite, compare, run

from lamina.config import DEFAULT_MODEL, DTYPES, KV_DTYPES, EngineConfig
from lamina.errors import LaminaError
from lamina.launch.kv_sizing import holder_config
from lamina.measure.probe import Probe, loaded
from lamina.models.resolve import resolve
from lamina.policy_file import head_policies
from lamina.system.machine import native_dtype, this_machine
from lamina.text.tokenizer import Tokenizer
from lamina_workers.attention_worker.page_layout import attention_kernels
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.model_checkpoint import fingerprint

import torch  # isort: skip  # after lamina, which sets up its threads
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

FLOOR = "full, other chunks"
TASKS = ("text", "passkey", "needle", "copying", "recall", "heads")
FLOOR_CHUNK = 0.375  # of --chunk
FILLS = ("full", "none", "left", "right", "top", "bottom")  # of a text's marks in the picture


def main() -> None:
    args = parsed()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        evaluate(args, console)
    except LaminaError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--context", type=int, default=8192, help="tokens of each text and task")
    parser.add_argument("--policies", nargs="*", default=["streaming(sink=64, recent=256)"], help="beside full")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="text files; none: Python's own help topics")
    parser.add_argument("--texts", type=int, default=4, help="pieces of each text")
    parser.add_argument("--steps", type=int, default=128, help="tokens of each piece that are predicted")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--repeats", type=int, default=1, help="passkeys and needles at each depth")
    parser.add_argument("--samples", type=int, default=4, help="prompts of copying and of recall")
    parser.add_argument("--gate", type=float, default=0.5, help="of a task's answers that full must give")
    parser.add_argument("--head-steps", type=int, default=8)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--kv-dtype", default="auto", choices=KV_DTYPES)
    parser.add_argument("--kv-memory", help="such as 4GiB; without it, a quarter of what is available")
    parser.add_argument("--batch", type=int, default=4, help="sequences at a time")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prompt at a time")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where else to write the results")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results and pictures")
    args = parser.parse_args()
    if not 0 < args.gate <= 1:
        parser.error(f"--gate is {args.gate}; allowed is above 0, up to 1")
    for name in ("texts", "repeats", "samples", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; allowed is 1 or more")
    if args.chunk < 8:
        parser.error(f"--chunk is {args.chunk}; allowed is 8 or more")
    return args


def evaluate(args: argparse.Namespace, console: Console) -> None:
    path = resolve(args.model)
    model = ModelConfig.from_folder(path)
    print_of = fingerprint(path)
    policies = [policy for policy in dict.fromkeys(args.policies) if policy != "full"]
    for policy in policies:
        head_policies(policy, model, print_of)  # a wrong one fails before the first has run
    args.out.mkdir(parents=True, exist_ok=True)
    scaling = yarn(model, args.context)
    said = about(args, path, print_of, scaling)
    where = f"{args.model}, {args.context} tokens, {said['dtype']}"
    console.print(f"{where}; {said['processor']}, {said['threads']} threads")
    shared = EngineConfig(
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        kv_memory=args.kv_memory,
        threads=args.threads,
        rope_scaling=scaling,
    )
    results: dict[str, Comparison] = {}
    seconds: dict[str, float] = {}
    with Progress(console=console, transient=True) as progress:
        for name, of, took in measured(args, shared, policies, progress):
            results[name], seconds[name] = of, round(took, 1)
            console.print(f"{short(name)}: {took:.0f} s")
            written = {
                "about": said | {"seconds": seconds},
                "results": {each: known.as_json() for each, known in results.items()},
            }
            for file in filter(
                None, (args.out / "results.json", args.json)
            ):  # each time: the next one may not end well
                file.write_text(json.dumps(written, indent=1) + "\n")
    for shown in tables(results):
        console.print(shown)
    for task, asked in results[FLOOR].tasks.items():
        if not asked.counted:
            console.print(f"{task} is not counted: the full cache gives {asked.full} of {asked.asked} answers")
    draw(results, where, args.out)
    console.print(f"written into {args.out}")


@contextmanager
def load(name: str, config: EngineConfig) -> Iterator[tuple[Probe, Tokenizer]]:
    """The model of that name, set up as `LLM(name, ...)` would, and its tokenizer."""
    machine = this_machine()
    with loaded(name, config) as (path, model, decoder, tokenizer):
        holder = holder_config(path, model, config, decoder.dtype, machine)
        yield Probe(model, decoder, holder, config.threads or machine.cores), tokenizer


def measured(
    args: argparse.Namespace, shared: EngineConfig, policies: Sequence[str], progress: Progress
) -> Iterator[tuple[str, Comparison, float]]:
    """The noise floor and each policy, beside the full cache, and the seconds that each took."""

    def through(probe: Probe, name: str, chunk: int = args.chunk) -> Run:
        task = progress.add_task(short(name), total=suite.tokens)
        done = run(probe, suite, Limits(args.batch, chunk), lambda tokens: progress.advance(task, tokens))
        progress.remove_task(task)
        return done

    with load(args.model, shared) as (probe, tokenizer):
        suite = make_suite(args, tokenizer)
        full = through(probe, "full")
        begun = time.perf_counter()
        floor = compare(suite, full, through(probe, FLOOR, int(args.chunk * FLOOR_CHUNK)), args.gate)
    yield FLOOR, floor, time.perf_counter() - begun
    for policy in policies:
        with load(args.model, replace(shared, policy=policy)) as (probe, _):
            begun = time.perf_counter()
            of = compare(suite, full, through(probe, policy), args.gate)
        yield policy, of, time.perf_counter() - begun


def yarn(model: ModelConfig, context: int) -> dict[str, Any] | None:
    """RoPE scaling for contexts longer than the model's."""
    made_for = model.max_position_embeddings
    if context <= made_for:
        return None
    return {"rope_type": "yarn", "factor": context / made_for, "original_max_position_embeddings": made_for}


def make_suite(args: argparse.Namespace, tokenizer: Tokenizer) -> Suite:
    """The texts and tasks that were asked for, in the model's tokens."""

    def encode(text: str) -> list[int]:
        return [token for token in tokenizer.encode(text) if token not in tokenizer.special_ids]

    begin = tokenizer.encode("")[:1]
    sources = {file.name: encode(file.read_text()) for file in args.text}
    if not sources:
        sources["pydoc topics"] = encode("\n\n".join(pydoc_data.topics.topics.values()))
    hay = next(iter(sources.values()))
    context, seed = args.context, args.seed
    depths = sorted(args.depths * args.repeats)
    items: list[tasks.Item] = []
    if "passkey" in args.tasks:
        items += tasks.passkey(encode, begin, context, depths, seed)
    if "needle" in args.tasks:
        items += tasks.needle(encode, begin, hay, context, depths, seed)
    if "copying" in args.tasks:
        items += tasks.copying(begin, hay, context, args.samples, min(32, context // 8), seed)
    if "recall" in args.tasks:
        items += tasks.recall(encode, begin, hay, context, args.samples, seed)
    texts = {source: tasks.windows(begin, ids, context, args.texts) for source, ids in sources.items()}
    return Suite(
        texts=texts if "text" in args.tasks else {},
        items=items,
        heads=texts[next(iter(sources))][0] if "heads" in args.tasks else (),
        steps=args.steps,
        head_steps=args.head_steps,
    )


def about(args: argparse.Namespace, path: Path, print_of: str, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """What the results are of, for the file."""
    machine = this_machine()
    given = {name: getattr(args, name) for name in sorted(vars(args)) if name not in ("json", "out", "policies")}
    return given | {
        "text": [file.name for file in args.text] or ["pydoc topics"],
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


def short(name: str) -> str:
    """A policy's name for tables and pictures: a file without its folders."""
    return Path(name).name if name.endswith(".toml") else name.replace(" ", "") if "(" in name else name


def usage(of: Comparison) -> Total:
    """Where a policy's savings are read off: on the texts, else on what there is."""
    return next((of.usage[part] for part in ("texts", "items", "heads") if part in of.usage), Total())


def tables(results: Mapping[str, Comparison]) -> Iterator[Table]:
    first = next(iter(results.values()))
    for source in first.texts:
        rows = {name: of_text(of, source) for name, of in results.items()}
        columns = ["KV read", "KV held", "missed", "NLL", "change", "±", "KL", "top-1"]
        yield table(f"{source}: missed is the attention mass not read, as the policy estimates it", columns, rows)
    if first.tasks:
        rows = {name: [answered(of) for of in by.tasks.values()] for name, by in results.items()}
        yield table("answers kept, of those that the full cache gives", list(first.tasks), rows)
    if first.heads is not None:
        rows = {name: of_heads(of) for name, of in results.items()}
        columns = ["cosine", "worst", "error", "worst", "mass seen", "worst", "missed"]
        yield table("heads beside exact attention: mean, and the worst of layers and heads", columns, rows)


def table(title: str, columns: list[str], rows: Mapping[str, list[str]]) -> Table:
    shown = Table(title=title)
    shown.add_column("policy", overflow="fold")
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        shown.add_row(short(name), *cells)
    return shown


def of_text(of: Comparison, source: str) -> list[str]:
    total, text = usage(of), of.texts[source]
    error = text.error / text.full_nll if text.full_nll > 0 else 0.0
    return [
        f"{total.read_share:.0%}",
        f"{total.held_share:.0%}",
        missed(total),
        f"{text.nll:.4f}",
        f"{text.relative:+.2%}",
        f"{error:.2%}",
        f"{text.divergence:.4f}",
        f"{text.agreement:.1%}",
    ]


def answered(of: Score) -> str:
    return f"{of.kept}/{of.full}" if of.counted else f"full: {of.full}/{of.asked}"


def of_heads(of: Comparison) -> list[str]:
    cells = []
    for name, worst in (("cosine", torch.min), ("error", torch.max), ("mass", torch.min)):
        measure = getattr(of.heads, name)
        known = measure[~measure.isnan()]
        cells += [f"{known.mean():.4f}", f"{worst(known):.3f}"] if len(known) else ["-", "-"]
    return [*cells, missed(of.usage["heads"])]


def missed(total: Total) -> str:
    return f"{total.missed_share:.2%}" if total.queries else "-"


def draw(results: Mapping[str, Comparison], where: str, out: Path) -> None:
    """Quality over what was read and held, one point a policy, and every head's fidelity."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: they need matplotlib, pip install 'lamina[plots]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if next(iter(results.values())).texts:
        draw_quality(pyplot, results, where, out / "quality.png")
    if next(iter(results.values())).heads is not None:
        draw_heads(pyplot, results, where, out / "heads.png")


def draw_quality(pyplot: Any, results: Mapping[str, Comparison], where: str, file: Path) -> None:
    sources = list(next(iter(results.values())).texts)
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex="col", sharey="row", layout="constrained")
    colours, markers = pyplot.get_cmap("tab10").colors, "osD^v<>P*X"
    for number, (name, of) in enumerate(results.items()):
        if name == FLOOR:
            continue
        total = usage(of)
        for column, share in enumerate((total.read_share, total.held_share)):
            for source in sources:
                text = of.texts[source]
                style = {
                    "color": colours[number % 10],
                    "marker": markers[number % len(markers)],
                    "fillstyle": FILLS[sources.index(source) % len(FILLS)],
                    "linestyle": "none",
                }
                label = short(name) if source == sources[0] and column == 0 else None
                relative = 100 / text.full_nll if text.full_nll > 0 else 0.0
                axes[0, column].errorbar(share, 100 * text.relative, yerr=text.error * relative, label=label, **style)
                axes[1, column].plot(share, 100 * text.agreement, **style)
    floors = results[FLOOR].texts.values()
    for column in range(2):
        axes[0, column].axhline(0, color="grey", linewidth=0.8)
        worst = min(text.agreement for text in floors)
        line = axes[1, column].axhline(100 * worst, color="grey", linestyle="--", linewidth=0.8)
    line.set_label("full, its prompts cut into other chunks")
    axes[0, 0].set_ylabel("change of NLL, %  (bars: standard error)")
    axes[1, 0].set_ylabel("top-1 agreement with full, %")
    for column, name in enumerate(("KV read in decode", "KV held")):
        axes[1, column].set_xlabel(f"{name}, share of the full cache's")
        axes[1, column].set_xlim(0, 1.05)
    changes = [100 * abs(text.relative) for of in results.values() for text in of.texts.values()]
    if max(changes) > 10:
        axes[0, 0].set_yscale("symlog", linthresh=1)
        axes[0, 0].yaxis.set_major_formatter("{x:g}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    fills = [f"{source} ({FILLS[at % len(FILLS)]})" for at, source in enumerate(sources)]
    figure.suptitle(f"{where}: {', '.join(fills if len(sources) > 1 else sources)}")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def draw_heads(pyplot: Any, results: Mapping[str, Comparison], where: str, file: Path) -> None:
    shown = {name: of.heads.cosine for name, of in results.items() if of.heads is not None}
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
