"""Slices between attentions as graphs and compiled: the same logits, padded to buckets, each run with its own memory.

Graphs need a GPU; what records here runs the slice again where a graph would be launched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from engine_rig import DEVICE, Rig, tiny_decoder

from lamina_workers.decoder.graphs import BUCKETS, Captured, CudaGraphs, Tensors, Work, bucket, sliced
from lamina_workers.decoder.model import Batch, Decoder, KeyValueReady, QueryReady

# Importing torch's own compiler warns of what torch uses itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

MOE = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
GREEDY = {"max_tokens": 12, "temperature": 0}
PROMPTS = [[7, 8, 9], list(range(30)), [5]]


class Again:
    """Records by keeping the work: a launch does it again, into the tensors that it gave first."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, ...]] = []  # tokens of each result
        self.launched = 0

    def record(self, work: Work) -> tuple[Callable[[], None], Tensors]:
        results = tuple(x.clone() for x in work())
        self.recorded.append(tuple(map(len, results)))

        def launch() -> None:
            self.launched += 1
            for result, x in zip(results, work(), strict=True):
                result.copy_(x)

        return launch, results


class Never:
    def record(self, work: Work) -> tuple[Callable[[], None], Tensors]:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def made() -> list[Again]:
    return []


def captured(decoder: Decoder, made: list[Again], buckets: tuple[int, ...] = BUCKETS) -> Captured:
    def recorder() -> Again:
        made.append(Again())
        return made[-1]

    return Captured(decoder, recorder, buckets)


def batch(tokens: int, sampled: list[int] | None = None) -> Batch:
    at = torch.arange(tokens, device=DEVICE)
    wanted = at if sampled is None else torch.tensor(sampled, dtype=torch.int64, device=DEVICE)
    return Batch(at * 7 % 101, at + 3, wanted)


def answer(event: QueryReady | KeyValueReady, q: torch.Tensor) -> torch.Tensor | None:
    """Some attention, which depends on q, k and v."""
    if isinstance(event, QueryReady):
        return None
    group = q.shape[1] // event.k.shape[1]
    return q * event.k.repeat_interleave(group, 1).sigmoid() + event.v.repeat_interleave(group, 1)


@torch.inference_mode()
def logits(decoder: Decoder, batch: Batch, query_first: bool = False) -> torch.Tensor:
    forward = decoder.forward(batch, query_first=query_first)
    event, q = next(forward), torch.empty(0)
    try:
        while True:
            q = event.q if isinstance(event, QueryReady) else q
            event = forward.send(answer(event, q))
    except StopIteration as end:
        result: torch.Tensor = end.value
        return result


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 33, 256)] == [1, 2, 4, 4, 8, 64, 256]
    assert bucket(257) is None
    assert bucket(0) is None
    assert bucket(3, ()) is None


class TestCaptured:
    def test_a_graph_is_recorded_once_a_bucket_layer_and_slice(self, decoder: Decoder, made: list[Again]) -> None:
        faster = captured(decoder, made)
        logits(faster, batch(3))
        assert made[0].recorded == [(4, 4, 4), (4,)] * 3
        assert made[0].launched == 0
        logits(faster, batch(4))
        assert (len(made[0].recorded), made[0].launched) == (6, 6)
        logits(faster, batch(5))
        assert made[0].recorded[6:] == [(8, 8, 8), (8,)] * 3
        assert len(made) == 1

    def test_past_the_last_attention_there_are_fewer_tokens(self, decoder: Decoder, made: list[Again]) -> None:
        faster = captured(decoder, made)
        for sampled in ([4], [0, 4, 2], []):
            check(logits(faster, batch(5, sampled)), logits(decoder, batch(5, sampled)))
        assert made[0].recorded == [(8, 8, 8), (8,), (8, 8, 8), (8,), (8, 8, 8), (1,), (4,)]

    def test_larger_batches_run_as_they_are(self, decoder: Decoder, made: list[Again]) -> None:
        faster = captured(decoder, made, (1, 2, 4))
        check(logits(faster, batch(5)), logits(decoder, batch(5)))
        assert made[0].recorded == []

    def test_runs_at_the_same_time_share_nothing(self, decoder: Decoder, made: list[Again]) -> None:
        faster = captured(decoder, made)
        with torch.inference_mode():
            first, second = faster.forward(batch(3)), faster.forward(batch(4))
            one = next(first)
            assert isinstance(one, QueryReady)
            kept = one.q.clone()
            next(second)
            assert torch.equal(one.q, kept)
            first.close()
            second.close()
        assert len(made) == 2
        check(logits(faster, batch(3)), logits(decoder, batch(3)))
        assert len(made) == 2  # a run that was closed has left its graphs

    def test_experts_are_not_recorded(self, made: list[Again]) -> None:
        decoder = tiny_decoder(**MOE)
        faster = captured(decoder, made)
        for _ in range(2):
            check(logits(faster, batch(5)), logits(decoder, batch(5)))
        assert made[0].recorded == [(8, 8, 8)] * 3

    def test_q_comes_first_by_two_graphs_and_together_by_one(self, decoder: Decoder, made: list[Again]) -> None:
        faster = captured(decoder, made)
        for tokens in (3, 4, 2, 3):
            for first in (True, False):
                check(logits(faster, batch(tokens), first), logits(decoder, batch(tokens), first))
        two, one = [(4, 4), (4, 4), (4,)] * 3, [(4, 4, 4)] * 3
        assert made[0].recorded[:12] == two + one  # what comes after the attention is the same
        two, one = [(2, 2), (2, 2), (2,)] * 3, [(2, 2, 2)] * 3
        assert made[0].recorded[12:] == two + one

    def test_q_has_left_before_k_and_v_are_computed(self, decoder: Decoder, made: list[Again]) -> None:
        faster = captured(decoder, made)
        with torch.inference_mode():
            forward = faster.forward(batch(3), query_first=True)
            next(forward)
            assert made[0].recorded == [(4, 4)]
            next(forward)
            assert made[0].recorded == [(4, 4), (4, 4)]
            forward.close()

    def test_layers_without_rotation_and_where_nothing_can_be_recorded(self, made: list[Again]) -> None:
        decoder = tiny_decoder(architectures=["SmolLM3ForCausalLM"], model_type="smollm3", no_rope_layers=[1, 0, 1])
        for faster in (captured(decoder, made), Captured(decoder, Never), captured(decoder, made, (1, 2))):
            for first in (True, True, False, False):
                check(logits(faster, batch(6), first), logits(decoder, batch(6)))

    def test_a_collective_is_the_decoders_own(self, decoder: Decoder, made: list[Again]) -> None:
        faster = captured(decoder, made)
        assert faster.collective is decoder.collective is None
        with pytest.raises(ValueError, match="rank 0 of 1 got a collective of rank"):
            faster.collective = Rank1()  # type: ignore[assignment]

    def test_where_nothing_can_be_recorded_it_is_said_once(
        self, decoder: Decoder, caplog: pytest.LogCaptureFixture
    ) -> None:
        faster = Captured(decoder, Never)
        with caplog.at_level(logging.WARNING, "lamina"):
            for tokens in (3, 3, 5):
                check(logits(faster, batch(tokens)), logits(decoder, batch(tokens)))
        assert [record.message for record in caplog.records] == [
            "no graph of 4 tokens can be recorded, so none is used: operation not permitted when stream is capturing"
        ]

    @pytest.mark.parametrize("lanes", [1, 2])
    def test_an_engine_says_the_same(self, decoder: Decoder, lanes: int, made: list[Again]) -> None:
        texts = []
        for model in (decoder, captured(decoder, made)):
            rig = Rig(model, shard="heads", weights=(1, 1), lanes=lanes)
            texts.append(rig.generate(PROMPTS, **GREEDY))
            rig.close()
        assert texts[0] == texts[1]
        assert any(each.launched for each in made)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
    def test_graphs_of_a_gpu(self, decoder: Decoder) -> None:
        faster = Captured(decoder, lambda: CudaGraphs(decoder.device))
        for tokens in (1, 3, 4, 3):
            check(logits(faster, batch(tokens)), logits(decoder, batch(tokens)))


class Rank1:
    rank, ranks = 1, 2


def test_only_a_gpus_decoder_is_recorded(decoder: Decoder) -> None:
    assert (sliced(decoder) is decoder) == (DEVICE == "cpu")
