"""What this machine has, what Lamina will use of it, and why (`examine`): findings, to print or to send as JSON.

The choices come from the functions that load a model use. No model is loaded.

The commands around models are here too (`models_app`): list, fetch, describe, remove.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lamina.cli import options as opt
from lamina.cli.terminal import ProgressBars, decode_argument, print_json, print_rows, show_bytes
from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.models.cache import cache_folder
from lamina.system.machine import Machine, native_dtype, this_machine

if TYPE_CHECKING:
    from lamina.models.weight_memory import WeightMemory

PACKAGES = ("torch", "numpy", "numba", "tokenizers", "transformers")
_KERNELS = {"cpu": "loops compiled by numba", "triton": "Triton's interpreter, slow, as LAMINA_KERNELS says"}
_READING = 0.6  # of a step of one sequence: of small models 0.44, of larger ones 0.65 (docs/internals/performance.md)
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `shown` is `value` for people, where that differs."""

    section: str
    name: str
    value: str | int | bool | None
    shown: str = ""


def examine(tls_dir: Path | None = None) -> Iterator[Finding]:
    """`tls_dir`: a folder of certificates, to be looked at too."""
    machine = this_machine()
    yield from _hardware(machine)
    yield from _versions()
    yield from _choices(machine)
    yield from _storage()
    if tls_dir is not None:
        yield from _certificates(tls_dir)


def as_json(findings: list[Finding]) -> dict[str, dict[str, str | int | bool | None]]:
    report: dict[str, dict[str, str | int | bool | None]] = {}
    for finding in findings:
        report.setdefault(finding.section, {})[finding.name] = finding.value
    return report


def _hardware(machine: Machine) -> Iterator[Finding]:
    yield Finding("machine", "processor", machine.processor)
    yield Finding("machine", "cores", machine.cores)
    for flag in FLAGS:
        present = flag in machine.flags
        yield Finding("machine", flag, present, "yes" if present else "no")
    yield Finding("machine", "memory_bytes", machine.memory, show_bytes(machine.memory))
    yield Finding("machine", "memory_available_bytes", machine.memory_available, show_bytes(machine.memory_available))
    gpus = _gpus()
    yield Finding("machine", "gpus", ", ".join(gpus) or None, ", ".join(gpus) or "none that torch can use")


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name} ({show_bytes(device.total_memory)})" for device in devices]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version())
    for package in ("lamina", *PACKAGES):
        try:
            yield Finding("versions", package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding("versions", package, None, "not installed")


def _choices(machine: Machine) -> Iterator[Finding]:
    import torch

    from lamina_kernels.select import CHOICES
    from lamina_workers.attention_worker.page_layout import attention_kernels
    from lamina_workers.errors import KernelsUnavailable

    dtype, reason = native_dtype(machine)
    if torch.cuda.is_available():
        yield Finding("choices", "device", "cuda", "cuda: torch finds a GPU")
        dtype, reason = "bfloat16", "the device is a GPU"
    else:
        yield Finding("choices", "device", "cpu", "cpu: torch finds no GPU")
    yield Finding("choices", "dtype", dtype, f"{dtype}: {reason}")
    try:
        attention_kernels()
        name = os.environ.get("LAMINA_KERNELS", CHOICES["cpu"][0])
        yield Finding("choices", "attention_kernels", name, f"{name}: {_KERNELS[name]}")
    except KernelsUnavailable as error:
        yield Finding("choices", "attention_kernels", f"none: {error}")


def _storage() -> Iterator[Finding]:
    folder = cache_folder()
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(_existing(folder)).free
    yield Finding("storage", "cache", str(folder))
    yield Finding("storage", "cache_bytes", size, show_bytes(size))
    yield Finding("storage", "free_bytes", free, show_bytes(free))


def _certificates(folder: Path) -> Iterator[Finding]:
    from lamina_workers.process.credentials import certificate_end

    for name in ("ca.pem", "cert.pem"):
        try:
            end = certificate_end((folder / name).read_bytes())
        except (OSError, ValueError) as error:
            yield Finding("certificates", name, None, f"none: {error}")
            continue
        days = (end - datetime.datetime.now(datetime.timezone.utc)).days
        remaining = f"in {days} days" if days >= 0 else "expired"
        yield Finding("certificates", name, days, f"{remaining}: good until {end:%Y-%m-%d %H:%M} UTC")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


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
    """Describe a model, and what it will take of this machine; fetches it first where it is not here yet."""
    from lamina.models.resolve import resolve
    from lamina.models.weight_memory import weight_memory
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
        "weight_kinds": weights.kinds,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "sliding_windows": windows,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "runs": way(config),
        **_expected(folder, weights),
    }
    live = live_across(config) if slices else []
    if as_json:
        print_json(facts | {"weight_memory": weights.ways} | ({"live_across": live} if slices else {}))
        return
    grown = weights.ways.get("packed", 0) > 1.1 * weights.stored
    weight_rows = (
        (f"weights, {name}", f"{show_bytes(count)}, {count / weights.parameters:.3g} bytes each{note}")
        for name, count in weights.ways.items()
        for note in [f": the file's {show_bytes(weights.stored)} unpacked" if name == "packed" and grown else ""]
    )
    kinds = ", ".join(f"{kind} {show_bytes(count)}" for kind, count in weights.kinds.items())
    texts = {name: str(value) for name, value in facts.items()} | {"weight_kinds": kinds}
    print_rows([*texts.items(), *weight_rows, *_live_rows(live)])


def _expected(folder: Path, weights: WeightMemory) -> dict[str, Any]:
    """What the model takes of this machine as an engine runs it where nothing else is said, on CPUs; of models whose
    layers are not described only what the weights take.

    kv_bytes_per_token: in 16 bits. tokens_that_fit: of one sequence, if its KV may take all memory that is available.
    step_bytes: what one sequence's next token reads beside its KV, the experts that it chooses, and its states.
    tokens_per_second: of a short sequence, if reading these bytes is `_READING` of a step.
    """
    import torch

    from lamina.measure.bench.decode import READ, kept_as
    from lamina.measure.hardware.reading import Bandwidth
    from lamina.models.weight_memory import FLOATS
    from lamina.simulator.costs.model_configs import from_folder

    machine = this_machine()
    way, dtype = weights.usual(machine), native_dtype(machine)[0]
    resident, available = weights.ways[way], machine.memory_available
    facts = {"resident_bytes": resident, "memory_available_bytes": available, "fits": resident < available}
    try:
        shape = from_folder(folder)
    except InvalidRequest:
        return facts
    kv, states = shape.kv_bytes_per_token(), shape.state_bytes_held
    room = max(0, available - resident - states)
    in_memory = replace(kept_as(shape, weights, EngineConfig(device="cpu")), element=FLOATS[dtype])
    step = in_memory.weights_read(1) + 2 * shape.state_bytes
    rate = Bandwidth(READ, torch.device("cpu"), machine.cores).settled()
    return facts | {
        "active_parameters": shape.active_parameters,
        "kv_bytes_per_token": int(kv),
        "state_bytes_per_sequence": states,
        "tokens_that_fit": int(room / (kv * FLOATS[dtype] / 2)) if kv else None,
        "step_bytes": int(step),
        "memory_bytes_per_second": int(rate),
        "tokens_per_second": round(rate / step * _READING, 1),
    }


def _live_rows(live: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What lives across each attention, a row for neighbours that are alike."""
    for what, group in groupby(enumerate(live), lambda item: item[1]):
        layers = [layer for layer, _ in group]
        last = f"-{layers[-1]}" if len(layers) > 1 else ""
        yield f"live across attention {layers[0]}{last}", f"{what}, a token"
