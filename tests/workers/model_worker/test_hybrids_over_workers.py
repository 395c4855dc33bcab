"""Families with layers that keep states, over attention workers, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from exchange_peers import Joints
from hybrid_families import FAMILIES
from reference_models import DECODED, PROMPT, load, reference

from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_protocols.messages.messages import Open, Row
from lamina_protocols.messages.pools import pools
from lamina_protocols.messages.routes import HolderBatch, Route, Span
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.sampler import RowSampling
from lamina_workers.model_worker.interface import BatchWork, result
from lamina_workers.model_worker.model_worker import ModelWorker

# Newer transformers would rather have it called `cache`, older ones know only this name.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")


def expected(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits of a prompt, and of tokens decoded after it."""
    with torch.inference_mode():
        step = model(torch.tensor([tokens[:PROMPT]]), use_cache=True)
        found = [step.logits[0]]
        for at in range(PROMPT, len(tokens)):
            step = model(torch.tensor([tokens[at : at + 1]]), past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits[0])
    return torch.cat(found)


class Sequence:
    """One sequence, whose heads are dealt among workers behind channels: in each pool, every n-th to one of n."""

    def __init__(self, decoder: Decoder, joints: Joints, holders: int) -> None:
        config = HolderConfig(tuple(decoder.config.layer_specs()), 16, "float32", 1 << 24)
        specs = [pool.config.layers[0] for pool in pools(config)]
        self.workers = [AttentionWorker(config) for _ in range(holders)]
        self.model_worker = ModelWorker(decoder, config, dict(enumerate(map(joints, self.workers))))
        self.heads = [[tuple(range(n, spec.kv_heads, holders)) for spec in specs] for n in range(holders)]
        self.keep_states = [spec.kind in STATES for spec in specs]
        self.length = 0

    def share(self, number: int, count: int) -> HolderBatch:
        """What one batch asks of a holder: rows of its parts, of which attention's are fused in decode."""
        start, end = self.length, self.length + count
        own = [(pool, heads) for pool, heads in enumerate(self.heads[number]) if heads]
        routes = []
        for pool, heads in own:
            upto = end if count == 1 and not self.keep_states[pool] else start
            row = Row(pool + 1, start, count, (0, upto) if upto else None, True)
            routes.append(Route(0, heads, row, (start, end), pool))
        opens = tuple(Open(pool + 1, pool, heads, 0, 1000) for pool, heads in own)
        return HolderBatch(len(opens) if start else 0, () if start else opens, tuple(routes))

    def run(self, tokens: list[int], again: bool = False) -> torch.Tensor:
        """Logits of the next tokens; `again`: their batch is announced and given up first."""
        count = len(tokens)
        shares = {number: self.share(number, count) for number in range(len(self.workers))}
        sampling = (RowSampling(),) * count
        work = BatchWork((Span(self.length, count),), (PROMPT,), tokens, tuple(range(count)), sampling)
        for _ in range(1 + again):
            batch, answers = self.model_worker.announce_now(shares)
            assert all(answer.accepted for answer in answers.values()), answers
            logits, _ = result(self.model_worker.compute(work, batch, shares))
        self.length += count
        return logits


@pytest.mark.parametrize("holders", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_over_workers_equals_transformers(family: str, holders: int, tmp_path: Path) -> None:
    """The prompt at once and in chunks, one of which runs twice, then decoded tokens, every second one twice."""
    model = reference(*FAMILIES[family])
    decoder = load(model, tmp_path)
    tokens = torch.randint(3, 97, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(5)).tolist()
    wanted = expected(model, tokens)
    for chunks in ([PROMPT], [1, 7, PROMPT - 8]):
        with Joints() as joints:
            sequence = Sequence(decoder, joints, holders)
            found = []
            for number, count in enumerate([*chunks, *[1] * DECODED]):
                some = tokens[sequence.length : sequence.length + count]
                found.append(sequence.run(some, again=number % 2 == 1))
            torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-4, atol=1e-4)
            for worker in sequence.workers:
                worker.check_integrity()
