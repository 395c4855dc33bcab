"""Policy files: the KV policy of each layer and KV head of a model, as TOML that a person can read and edit.

    version = 1
    model = "smollm2-135m"      # for readers
    fingerprint = "..."         # of `checkpoints.model_checkpoint.fingerprint`; "": any model of this shape
    [about]                     # remarks for readers: texts, numbers, true or false
    [[layer]]                   # one for each layer, in order
    heads = ["full", "streaming(sink=64, recent=256)"]

Every error is a PolicyError that names the file, the value and what is allowed. `import_duo` makes
policy files from DuoAttention's published patterns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.errors import PolicyError
from lamina.system.text_files import read_text, read_toml, toml_value, write_text
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.policies.catalogue import parse

VERSION = 1
AUTO = "retrieval"  # exact while that is as fast, else by sketches of pages: measured in docs/long_context.md
MAX_LAYERS, MAX_HEADS = 1024, 4096  # as `ModelConfig` allows
_MAX_TEXT = 4000  # characters of a name or a remark
_KEYS = ("version", "model", "fingerprint", "about", "layer")
_BARE = re.compile(r"[A-Za-z0-9_-]{1,80}")
_ALPHAS = (-1.0, 2.0)  # published ones lie in [0, 1], or a little outside
_FINGERPRINT = re.compile(r"[0-9a-f]{0,64}")

Heads = tuple[tuple[str, ...], ...]
About = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """The contents of a policy file. `heads` has the policy of each KV head by layer, as `parse` reads it."""

    model: str
    fingerprint: str
    heads: Heads
    about: About = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in (("model", self.model), ("fingerprint", self.fingerprint)):
            if not isinstance(text, str) or len(text) > _MAX_TEXT:
                raise PolicyError(f"{name} is {text!r:.80}; allowed is a text of up to {_MAX_TEXT} characters")
        if not _FINGERPRINT.fullmatch(self.fingerprint):
            raise PolicyError(f'fingerprint is {self.fingerprint!r:.80}; allowed are hexadecimal digits, or ""')
        if not 1 <= len(self.heads) <= MAX_LAYERS:
            raise PolicyError(f"there are {len(self.heads)} layers; allowed are 1 to {MAX_LAYERS}")
        object.__setattr__(self, "heads", tuple(_layer(n, layer) for n, layer in enumerate(self.heads)))
        for name, value in self.about.items():
            if not _BARE.fullmatch(name):
                raise PolicyError(f"about has the key {name!r:.80}; allowed are 1 to 80 letters, digits, _ and -")
            _remark(f"about.{name}", value)

    def check(self, model: ModelConfig, fingerprint: str) -> None:
        """Raise PolicyError unless this file is for that model, whose files have that fingerprint."""
        self.check_fingerprint(fingerprint)
        self.policies(model.attention_layers, model.num_key_value_heads)

    def check_fingerprint(self, fingerprint: str) -> None:
        if self.fingerprint and self.fingerprint != fingerprint:
            raise PolicyError(
                f"this policy is for {self.model or 'a model'} with the fingerprint {self.fingerprint}; the model has "
                f'{fingerprint}. Allowed are the same, or fingerprint = "" for any model of this shape'
            )

    def policies(self, layers: int, heads: int) -> Heads:
        """The policies by layer and KV head. Raises PolicyError unless there are that many of each."""
        if len(self.heads) != layers:
            raise PolicyError(f"this policy has {len(self.heads)} layers; the model has {layers}")
        for number, layer in enumerate(self.heads):
            if len(layer) != heads:
                raise PolicyError(f"layer {number} of this policy has {len(layer)} heads; the model has {heads}")
        return self.heads


def kept(policy: str, length: int) -> int:
    """How many of `length` tokens a head under that policy keeps, before rounding to pages."""
    rule = parse(policy)
    window = min(rule.seen_from(length), length)
    return length - window + rule.staying(0, window, 1)


def kept_share(heads: Sequence[Sequence[str]], length: int) -> float:
    """The share of the KV of `length` tokens that a model keeps under these policies, before rounding to pages."""
    counts = [kept(policy, length) for layer in heads for policy in layer]
    return sum(counts) / (len(counts) * length)


def read(path: str | Path) -> PolicyFile:
    """The policy file at `path`, checked. Raises PolicyError."""
    try:
        return _from_toml(read_toml(path, error=PolicyError))
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error


def write(path: str | Path, file: PolicyFile) -> None:
    """Write a policy file, whole or not at all. Raises PolicyError."""
    write_text(path, dumps(file), PolicyError)


def dumps(file: PolicyFile) -> str:
    """The file's text, from which `read` makes an equal file."""
    lines = [
        f"version = {VERSION}",
        f"model = {toml_value(file.model)}",
        f"fingerprint = {toml_value(file.fingerprint)}",
    ]
    if file.about:
        lines += ["", "[about]", *(f"{name} = {toml_value(value)}" for name, value in file.about.items())]
    for number, layer in enumerate(file.heads):
        heads = [toml_value(policy) for policy in layer]
        one_line = f"heads = [{', '.join(heads)}]"
        many = ["heads = [", *(f"    {policy}," for policy in heads), "]"]
        lines += ["", f"[[layer]] # {number}", *([one_line] if len(one_line) <= 120 else many)]
    return "\n".join(lines) + "\n"


def import_duo(path: str | Path, sparsity: float, sink: int | None = None, recent: int | None = None) -> PolicyFile:
    """DuoAttention's full_attention_heads.tsv (arXiv 2410.10819) as a policy file for any model of that shape.

    The share `sparsity` of the KV heads with the smallest alpha becomes streaming; among equal alphas the lower layers
    come first. Sizes that are not given come from config.json beside the file, else they are the published 64 and 256.
    Raises PolicyError.
    """
    if not 0 <= sparsity <= 1:
        raise PolicyError(f"sparsity is {sparsity}; allowed is 0 to 1")
    alphas = read_alphas(path)
    sizes = _duo_sizes(Path(path).with_name("config.json"))
    policy = parse(
        f"streaming(sink={sizes[0] if sink is None else sink}, recent={sizes[1] if recent is None else recent})"
    )
    cells = [(layer, head) for layer, row in enumerate(alphas) for head in range(len(row))]
    ordered = sorted(cells, key=lambda cell: (alphas[cell[0]][cell[1]], cell))
    streaming = set(ordered[: round(sparsity * len(ordered))])
    heads = tuple(
        tuple(str(policy) if (layer, head) in streaming else "full" for head in range(len(row)))
        for layer, row in enumerate(alphas)
    )
    name = Path(path).parent.name
    about: dict[str, str | int | float | bool] = {"method": "DuoAttention, published", "sparsity": float(sparsity)}
    return PolicyFile(name, "", heads, about)


def read_alphas(path: str | Path) -> tuple[tuple[float, ...], ...]:
    """Alpha of each layer (row) and KV head (column) of a full_attention_heads.tsv, clamped to [0, 1].

    Raises PolicyError if rows differ in length, or a value is missing, no number, or far outside.
    """
    try:
        rows = [line.split() for line in read_text(path, error=PolicyError).splitlines() if line.strip()]
        if not 1 <= len(rows) <= MAX_LAYERS or not 1 <= len(rows[0]) <= MAX_HEADS:
            shape = f"{len(rows)} rows of {len(rows[0]) if rows else 0} numbers"
            raise PolicyError(f"it has {shape}; allowed are 1 to {MAX_LAYERS} rows of 1 to {MAX_HEADS}")
        for number, row in enumerate(rows, 1):
            if len(row) != len(rows[0]):
                raise PolicyError(f"row {number} has {len(row)} numbers; allowed are {len(rows[0])}, as in row 1")
        return tuple(tuple(_alpha(number, word) for word in row) for number, row in enumerate(rows, 1))
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error


def _alpha(row: int, word: str) -> float:
    low, high = _ALPHAS
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # NaN compares false
        raise PolicyError(f"row {row} has {word!r:.80}; allowed are numbers from {low:g} to {high:g}")
    return min(1.0, max(0.0, value))


def _duo_sizes(path: Path) -> tuple[int, int]:
    """(sink, recent) of a DuoAttention config.json: the sizes for deployment if it has them, else those of its
    training."""
    if not path.exists():
        return 64, 256
    try:
        config = _json(path)
        sizes = []
        for name, default in (("sink", 64), ("recent", 256)):
            value = config.get(f"deploy_{name}_size")
            value = config.get(f"{name}_size", default) if value is None else value
            if type(value) is not int:
                raise PolicyError(f"{name}_size is {value!r:.80}; allowed is a whole number")
            sizes.append(value)
        return sizes[0], sizes[1]
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error


def _json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises PolicyError, which does not name the file."""
    try:
        data = json.loads(read_text(path, error=PolicyError))
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"it is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise PolicyError(f"it holds a {type(data).__name__}; allowed is an object")
    return data


def _from_toml(data: dict[str, Any]) -> PolicyFile:
    if (version := data.get("version")) != VERSION or type(version) is not int:
        raise PolicyError(f"version is {version!r:.80}; allowed is {VERSION}")
    _known(data, _KEYS, "the file")
    layers = data.get("layer", [])
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise PolicyError(f"layer is {layers!r:.80}; allowed are tables, written [[layer]]")
    for number, layer in enumerate(layers):
        _known(layer, ("heads",), f"layer {number}")
    about = data.get("about", {})
    if not isinstance(about, dict):
        raise PolicyError(f"about is {about!r:.80}; allowed is a table, written [about]")
    heads = tuple(layer.get("heads", []) for layer in layers)
    return PolicyFile(data.get("model", ""), data.get("fingerprint", ""), heads, about)


def _known(table: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    if unknown := [name for name in table if name not in allowed]:
        raise PolicyError(f"{where} has the key {unknown[0]!r:.80}; allowed are {', '.join(allowed)}")


def _layer(number: int, heads: Any) -> tuple[str, ...]:
    if not isinstance(heads, (list, tuple)) or not 1 <= len(heads) <= MAX_HEADS:
        raise PolicyError(f"heads of layer {number} is {heads!r:.80}; allowed are 1 to {MAX_HEADS} policies, in a list")
    return tuple(_canonical(f"layer {number}, head {head}", policy) for head, policy in enumerate(heads))


def _canonical(where: str, policy: Any) -> str:
    if not isinstance(policy, str):
        raise PolicyError(f"{where}: the policy is {policy!r:.80}; allowed is a text")
    try:
        return str(parse(policy))
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from error


def _remark(name: str, value: Any) -> None:
    allowed = isinstance(value, (bool, float)) or (isinstance(value, str) and len(value) <= _MAX_TEXT)
    if not allowed and not (isinstance(value, int) and abs(value) < 1 << 63):
        raise PolicyError(
            f"{name} is {value!r:.80}; allowed are texts of up to {_MAX_TEXT} characters, numbers, true and false"
        )


def head_policies(policy: str | Path | None, layers: int, heads: int, fingerprint: str | None) -> Heads | None:
    """The policy of each KV head by layer; None if all heads read and keep everything.

    `fingerprint` is that of the model's files, None where it is not known. Raises PolicyError for a policy that is
    unknown, contradicts itself, or is for another model.
    """
    if policy is None or policy == "full":
        return None
    if isinstance(policy, Path) or policy.endswith(".toml"):
        file = read(Path(policy))
        try:
            if fingerprint is not None:
                file.check_fingerprint(fingerprint)
            return file.policies(layers, heads)
        except PolicyError as error:
            raise PolicyError(f"{policy}: {error}") from error
    text = AUTO if policy == "auto" else policy
    try:
        canonical = str(parse(text))
    except PolicyError as error:
        raise PolicyError(
            f'policy is {policy!r:.80}: {error}; also allowed are "auto" and a file ending in .toml'
        ) from error
    return ((canonical,) * heads,) * layers
