"""Rows of several tokens of one sequence, all of which are sampled, against the same tokens one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from real_workers import write_tiny_model

from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Open, Row
from lamina_protocols.messages.routes import HolderBatch, Route, Span
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.checkpoints.checkpoint import Checkpoint
from lamina_workers.converted.models import model_config
from lamina_workers.decoder.model import Decoder
from lamina_workers.model_worker.interface import BatchWork, result
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.ports.port import LocalAttention

END = 160
LENGTHS = (40, 61)  # of the prompts: one row comes to the end of a range, the other does not


class Rig:
    """A tiny model with holders of its KV, and two sequences in them. shares: heads and range of each holder."""

    def __init__(self, folder: Path, dtype: torch.dtype, shares: Sequence[tuple[tuple[int, ...], int, int]]) -> None:
        model = model_config(folder)
        with Checkpoint(folder) as checkpoint, torch.inference_mode():
            decoder = Decoder.load(model, checkpoint, dtype)
        holder = HolderConfig(model.layer_specs(), 16, str(dtype).removeprefix("torch."), 4 << 20)
        ports = {number: LocalAttention(AttentionWorker(holder)) for number in range(len(shares))}
        self.worker = ModelWorker(decoder, holder, ports)
        self.shares = shares
        self.first = 0
        self.held = [0] * len(LENGTHS)

    def run(self, tokens: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The logits behind each of the tokens that each sequence goes on with, `[tokens, vocab]`."""
        spans = tuple(Span(start, len(own)) for start, own in zip(self.held, tokens, strict=True))
        batches = {}
        for number, (heads, lo, hi) in enumerate(self.shares):
            routes = []
            for source, span in enumerate(spans):
                end = span.start + span.count
                row = Row(source, span.start, span.count, (lo, min(end, hi)), span.start < hi and end > lo, True)
                if lo < min(end, hi):
                    routes.append(Route(source, heads, row, row.stored(lo, hi)))
            opens = tuple(Open(handle, 0, heads, lo, hi) for handle in range(len(spans))) if not self.first else ()
            batches[number] = HolderBatch(self.first, opens, tuple(routes))
        batch, answers = self.worker.announce_now(batches)
        assert all(answer.accepted for answer in answers.values())
        self.first = len(LENGTHS)
        total = sum(map(len, tokens))
        work = BatchWork(spans, LENGTHS, [t for own in tokens for t in own], tuple(range(total)), ())
        logits, _ = result(self.worker.compute(work, batch, batches, suspends=False))
        self.held = [span.start + span.count for span in spans]
        return list(logits.split([len(own) for own in tokens]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("verify"))


BY_HEADS = [((0, 2), 0, END), ((1,), 0, END)]
BY_RANGES = [((0, 1, 2), 0, 64), ((0, 1, 2), 64, END)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shares", [[((0, 1, 2), 0, END)], BY_HEADS, BY_RANGES], ids=["one", "heads", "ranges"])
def test_drafts_are_verified_with_the_logits_that_they_would_have_had(
    folder: Path, dtype: torch.dtype, shares: Sequence[tuple[tuple[int, ...], int, int]]
) -> None:
    """Rejected drafts leave nothing behind."""
    rng = random.Random(3)
    text = [[rng.randrange(100) for _ in range(END)] for _ in LENGTHS]
    alone, drafting = Rig(folder, dtype, shares), Rig(folder, dtype, shares)
    for rig in (alone, drafting):
        rig.run([own[:length] for own, length in zip(text, LENGTHS, strict=True)])
    wanted: list[dict[int, torch.Tensor]] = [{}, {}]
    for _ in range(60):
        at = list(alone.held)
        for n, logits in enumerate(alone.run([own[p : p + 1] for own, p in zip(text, at, strict=True)])):
            wanted[n][at[n]] = logits[0]
    for _ in range(12):
        at, rows, right = list(drafting.held), [], []
        for own, position in zip(text, at, strict=True):
            drafts = rng.choice([0, 4, rng.randint(0, 16)])
            right.append(rng.randint(0, drafts))  # so many are right
            rows.append(
                own[position : position + 1 + right[-1]] + [rng.randrange(100) for _ in range(drafts - right[-1])]
            )
        for n, logits in enumerate(drafting.run(rows)):
            for i in range(min(1 + right[n], LENGTHS[n] + 60 - at[n])):
                expected = wanted[n][at[n] + i]
                if dtype == torch.float32:
                    torch.testing.assert_close(logits[i], expected, rtol=1e-3, atol=1e-4)
                else:  # dense layers this small are oneDNN's, which sums otherwise for other numbers of rows
                    assert (logits[i] - expected).abs().mean() <= 0.02 * expected.std()
        drafting.held = [min(p + 1 + r, LENGTHS[n] + 50) for n, (p, r) in enumerate(zip(at, right, strict=True))]
