"""K and V of prompts that the full cache has computed once, kept in files: another run, or another policy, reads them
back instead of computing the prompt again.

What a layer gets depends on what the layers below it have read, so only policies that read prompts whole may begin so.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import open_memmap

from lamina.measure.probe import Probe
from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.kv_pool import KVPool
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import within

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes a number: what numpy has a name for
_CHUNK = 1024  # tokens that are stored at a time

Progress = Callable[[int], None]
"""Gets the number of tokens that have been computed since its last call."""


@dataclass(frozen=True, slots=True)
class KeptKV:
    """Prompts in `folder`, of a model and dtypes that `about` names; whatever differs there has files of its own."""

    folder: Path
    about: str

    def path(self, prompt: Sequence[int]) -> Path:
        """The folder of a prompt, whether it is there or not. Others may keep files there too."""
        key = hashlib.sha256(json.dumps([self.about, list(prompt)]).encode()).hexdigest()[:24]
        return self.folder / key

    def layers(self, prompt: Sequence[int], dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Of each layer k `[n, kv_heads, d_k]` and v `[n, kv_heads, d_v]`, mapped from the files; None where the prompt
        has none."""
        path = self.path(prompt)
        if not path.is_dir():
            return None
        count = sum(1 for _ in path.glob("*.k.npy"))
        each = [[open_memmap(path / f"{layer}.{name}.npy", mode="c") for name in "kv"] for layer in range(count)]
        return [(torch.from_numpy(k).view(dtype), torch.from_numpy(v).view(dtype)) for k, v in each]

    def begin(self, probe: Probe, prompt: Sequence[int], chunk: int, progress: Progress = lambda tokens: None) -> int:
        """A sequence of a probe with this prompt, read from the files, or computed where there are none or the probe's
        policies do not read prompts whole; the full cache's is kept. Returns its handle."""
        handle = probe.open()
        dtype = probe.dtype
        layers = self.layers(prompt, dtype) if reads_prompts_whole(probe, len(prompt)) else None
        if layers is None:
            self._compute(probe, handle, prompt, chunk, dtype)
        else:
            for at in range(0, len(prompt), _CHUNK):
                probe.store(handle, [(k[at : at + _CHUNK], v[at : at + _CHUNK]) for k, v in layers])
        progress(len(prompt))
        return handle

    def _compute(self, probe: Probe, handle: int, prompt: Sequence[int], chunk: int, dtype: torch.dtype) -> None:
        keeps = exact(probe.holder)
        pieces: dict[str, list[npt.NDArray[Any]]] = {}

        def tap(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
            for name, x in (("k", k), ("v", v)):
                bits = x.contiguous().view(_BITS[dtype.itemsize]).numpy().copy()
                pieces.setdefault(f"{layer}.{name}.npy", []).append(bits)

        probe.prefill(handle, prompt, chunk, tap if keeps else None)
        if not keeps:
            return
        path = self.path(prompt)
        self.folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=self.folder))
        for name, of_layer in pieces.items():
            np.save(made / name, np.concatenate(of_layer))
        if path.is_dir():  # another run was faster
            shutil.rmtree(made)
        else:
            made.rename(path)


def exact(holder: HolderConfig) -> bool:
    """Whether every head is read in full, prompts and decode."""
    return not any(spec.kind in STATES for spec in holder.layers) and all(
        text == "full" for spec in holder.layers for text in spec.policies
    )


def reads_prompts_whole(probe: Probe, tokens: int) -> bool:
    """Whether a prompt of so many tokens has the K and V that the full cache has, and nobody is shown its queries."""
    for number, pool in enumerate(pools(probe.holder)):
        specs, own = pool.config.layers, probe.worker.pools[number]
        if specs[0].kind in STATES or not isinstance(own, KVPool) or own.reader.observes:
            return False
        for spec, policies in zip(specs, HeadPolicies.of(pool.config).reads, strict=True):
            full, last = within(parse("full"), spec.window), max(0, tokens - 1)
            seen = {next(policy.views(last, 1)).keys(last, 0, tokens) for policy in (full, *policies)}
            if len(seen) > 1:
                return False
    return True
