"""The commands around models: list, fetch, describe, remove."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars, decode_argument, print_json, print_rows, show_bytes
from lamina.errors import InvalidRequest

models_app = typer.Typer(no_args_is_help=True, help="List, fetch, describe and remove models.")


@models_app.command("ls")
def list_models(as_json: opt.JsonLines = False) -> None:
    """The models that have a short name, and those converted on this machine, with what each takes here."""
    from lamina.models.aliases import ALIASES
    from lamina.models.cache import kept_bytes, kept_models
    from lamina.models.resolve import alias_folder

    rows: list[dict[str, Any]] = []
    fetched = {alias_folder(name): name for name in ALIASES}
    for name, alias in ALIASES.items():
        size = kept_bytes(alias_folder(name))
        rows.append({"model": name, "about": alias.about, "bytes": size})
    for name, folder in kept_models().items():
        if folder not in fetched:
            rows.append({"model": name, "about": f"converted, in {folder}", "bytes": kept_bytes(folder)})
    if as_json:
        print_json(*rows)
        return
    sizes = (show_bytes(row["bytes"]) if row["bytes"] else "not fetched" for row in rows)
    print_rows((row["model"], size, row["about"]) for row, size in zip(rows, sizes, strict=True))


@models_app.command()
def pull(model: opt.ModelName) -> None:
    """Fetch and convert a model, if that is still to do, and print its folder."""
    from lamina.models.resolve import resolve

    with ProgressBars() as progress:
        folder = resolve(decode_argument(model), progress)
    typer.echo(folder)


@models_app.command("rm")
def remove_model(model: opt.ModelName) -> None:
    """Remove a model that was fetched or converted, from Lamina's cache alone: a GGUF file of yours stays."""
    from lamina.models.aliases import ALIASES
    from lamina.models.cache import kept_models, remove
    from lamina.models.resolve import alias_folder

    name = decode_argument(model)
    folder = alias_folder(name) if name in ALIASES else kept_models().get(name)
    if folder is None:
        names = dict.fromkeys([*ALIASES, *kept_models()])
        raise InvalidRequest(
            f"no model {name!r:.200} in Lamina's cache; allowed are {', '.join(names)} "
            "(`hf cache rm` removes models of the hub)"
        )
    typer.echo(f"{name}: {show_bytes(remove(folder))} removed", err=True)


@models_app.command()
def show(model: opt.ModelName, as_json: opt.JsonLines = False, slices: opt.Slices = False) -> None:
    """Describe a model; fetches it first where it is not here yet."""
    from lamina.models.resolve import resolve, weight_memory
    from lamina_workers.converted.models import live_across, model_config, way

    with ProgressBars() as progress:
        folder = resolve(decode_argument(model), progress)
    config = model_config(folder)
    weights = weight_memory(folder)
    windows = sorted({window for window in config.windows if window is not None})
    facts = {
        "folder": str(folder),
        "architecture": config.architecture,
        "parameters": weights.parameters,
        "weight_bytes": weights.stored,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "sliding_windows": windows,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "runs": way(config),
        **_kept(folder),
    }
    live = live_across(config) if slices else []
    if as_json:
        print_json(facts | {"weight_memory": weights.ways} | ({"live_across": live} if slices else {}))
        return
    kept = (
        (f"weights, {name}", f"{show_bytes(count)}, {count / weights.parameters:.3g} bytes each")
        for name, count in weights.ways.items()
    )
    print_rows([*((name, str(value)) for name, value in facts.items()), *kept, *_live_rows(live)])


def _kept(folder: Path) -> dict[str, Any]:
    """What the model keeps of a token and of a sequence, in 16 bits; nothing where its layers are not described."""
    from lamina.simulator.costs.model_configs import from_folder

    try:
        shape = from_folder(folder)
    except InvalidRequest:
        return {}
    return {"kv_bytes_per_token": int(shape.kv_bytes_per_token()), "state_bytes_per_sequence": shape.state_bytes_held}


def _live_rows(live: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What lives across each attention, a row for neighbours that are alike."""
    for what, group in groupby(enumerate(live), lambda item: item[1]):
        layers = [layer for layer, _ in group]
        last = f"-{layers[-1]}" if len(layers) > 1 else ""
        yield f"live across attention {layers[0]}{last}", f"{what}, a token"
