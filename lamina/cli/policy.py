"""The commands around KV policies: find one for a model, import a published one, show a file, measure it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars, print_json, print_rows
from lamina.errors import InvalidRequest

if TYPE_CHECKING:
    from lamina.measure.calibration.calibrate import Settings

policy_app = typer.Typer(no_args_is_help=True, help="Import, look at and measure policy files: what KV heads keep.")

PolicyPath = Annotated[Path, typer.Argument(metavar="POLICY.toml", help="A policy file.")]
Out = Annotated[Path, typer.Option(help="Where to write the policy file; reports go beside it.")]
Context = Annotated[int | None, typer.Option(help="Tokens. Default: the model's context, up to 8192.")]
Text = Annotated[Path | None, typer.Option(help="A UTF-8 text file. Default: Python's help topics.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or auto.")]
Seed = Annotated[int, typer.Option(help="For random words, tokens and draws.")]
Sink = Annotated[int | None, typer.Option(help="First tokens that a head with a window keeps.")]


@policy_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="DuoAttention's full_attention_heads.tsv.")],
    out: Out,
    sparsity: Annotated[
        float | None, typer.Option(help="DuoAttention: the share of KV heads that become streaming, 0 to 1 [0.5].")
    ] = None,
    sink: Sink = None,
    recent: Annotated[int | None, typer.Option(help="Last tokens that it keeps, at least.")] = None,
) -> None:
    """Make a policy file of a published pattern. Its sizes come from config.json beside it unless given."""
    from lamina.policy_file import import_duo, write

    opt.check_output("out", out, ".toml")  # by which engines know a policy file
    policy = import_duo(file, 0.5 if sparsity is None else sparsity, sink, recent)
    write(out, policy)
    full = sum(text == "full" for layer in policy.heads for text in layer)
    typer.echo(f"{out}: {full} of {sum(map(len, policy.heads))} KV heads are full, the others streaming")


@policy_app.command()
def show(
    file: PolicyPath,
    context: Annotated[int, typer.Option(help="The length at which to count what is kept.")] = 8192,
    as_json: opt.JsonLines = False,
) -> None:
    """What a policy file says, and how much of the KV it keeps at a length, before rounding to pages."""
    from lamina.policy_file import kept_share, read

    if not 1 <= context <= 1 << 24:
        raise InvalidRequest(f"context is {context}; allowed are 1 to {1 << 24}")
    policy = read(file)
    share = kept_share(policy.heads, context)
    if as_json:
        facts: dict[str, Any] = {"model": policy.model, "fingerprint": policy.fingerprint, "about": dict(policy.about)}
        print_json(facts | {"heads": policy.heads, "context": context, "kv_kept": share})
        return
    typer.echo(f"{policy.model or 'any model'}, {policy.fingerprint or 'any of this shape'}")
    for name, value in policy.about.items():
        typer.echo(f"  {name}: {value}")
    rows = [("layer", "kept", "policies of KV heads")]
    for number, layer in enumerate(policy.heads):
        counted = ", ".join(f"{count} x {text}" for text, count in Counter(layer).items())
        rows.append((str(number), f"{kept_share([layer], context):.1%}", counted))
    print_rows(rows)
    typer.echo(f"KV kept at {context} tokens: {share:.1%}")


@policy_app.command()
def measure(
    model: opt.ModelName,
    file: PolicyPath,
    context: Context = None,
    text: Text = None,
    dtype: Dtype = "auto",
    threads: opt.Threads = None,
    seed: Seed = 0,
    as_json: opt.JsonLines = False,
) -> None:
    """What a policy file reads and holds, and costs in quality, on a long text in decode, beside the full cache."""
    from lamina.config import EngineConfig
    from lamina.measure.calibration.calibrate import measure as measured
    from lamina.policy_file import read

    with ProgressBars() as bars:
        quality = measured(
            model, read(file), EngineConfig(dtype=dtype, threads=threads), context, text, seed, progress=bars
        )
    print_json(asdict(quality)) if as_json else typer.echo(str(quality))


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How `lamina calibrate` looks for a policy."""

    target_quality: Annotated[
        float, typer.Option(help="0.99: NLL rises by 1 % at most, 97 % of likeliest tokens stay, passkeys too.")
    ] = 0.99
    context: Context = None
    sink: Sink = None
    recent: Annotated[int | None, typer.Option(help="Last tokens that a head sees whose gate is shut.")] = None
    steps: Annotated[int | None, typer.Option(help="Of the gates' training.")] = None
    text: Text = None
    scores: Annotated[Path | None, typer.Option(help="A .json file to keep heads' scores in, and to use again.")] = None
    dtype: Dtype = "auto"
    threads: opt.Threads = None
    seed: Seed = 0

    def settings(self) -> Settings:
        from lamina.measure.calibration.calibrate import Settings
        from lamina.measure.calibration.quality import Target

        names = ("context", "sink", "recent", "steps", "text", "scores", "seed")
        values = {name: getattr(self, name) for name in names}
        values = {name: value for name, value in values.items() if value is not None}
        return Settings(target=Target(self.target_quality), **values)


@opt.flatten_options
def calibrate(model: opt.ModelName, out: Out, how: CalibrationOptions) -> None:
    """Find what each KV head of a model has to keep, and write a policy file with a report beside it."""
    from lamina.config import EngineConfig
    from lamina.measure.calibration.calibrate import calibrate as calibrated
    from lamina.measure.calibration.report import write_report
    from lamina.policy_file import write

    opt.check_output("out", out, ".toml")
    if how.scores is not None and not how.scores.exists():
        opt.check_output("scores", how.scores, ".json")
    settings = how.settings()
    with ProgressBars() as bars:
        calibration = calibrated(model, settings, EngineConfig(dtype=how.dtype, threads=how.threads), bars)
    write(out, calibration.file)
    write_report(out, calibration, settings.target)
    if calibration.chosen is None:
        typer.echo(f"no choice met the target: {out} keeps everything", err=True)
        raise typer.Exit(1)
    typer.echo(f"{out}: {calibration.chosen.quality}")
