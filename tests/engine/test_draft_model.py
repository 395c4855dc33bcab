"""Drafts of a draft model: what its model says after the same tokens, whatever was accepted, ended or forgotten."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from dense_attention import DenseAttention
from engine_rig import DEVICE, holder_config, tiny_decoder

from lamina.engine import draft_model
from lamina.engine.draft_model import LOCAL, DraftModel, DraftModelProposer
from lamina.engine.drafting import Wanted
from lamina.kv.request import Request, ScheduledSequence
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina_protocols.messages.messages import Request as Message
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.sampler import RowSampling, sample
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.ports.port import LocalAttention

SAMPLED = SamplingParams(temperature=1.0, top_k=20)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


class _Port(LocalAttention):
    """Fails where `fails` is set."""

    fails = False

    def send(self, request: Message) -> None:
        if self.fails:
            raise HolderFault("made to fail")
        super().send(request)


def _proposer(
    decoder: Decoder, pages: int = 2000, context: int = 4096, vocabulary: int = 101
) -> tuple[DraftModelProposer, _Port]:
    config = holder_config(decoder, pages)
    port = _Port(attention_worker(config, device=torch.device(DEVICE)))
    worker = ModelWorker(decoder, config, {LOCAL: port})
    return DraftModelProposer(DraftModel(worker, (config.layers[0].kv_heads,), context, vocabulary)), port


def _wanted(tokens: Sequence[int], depth: int, params: SamplingParams = GREEDY, prompt: int = 0) -> Wanted:
    request = Request("r", tuple(tokens[: prompt or len(tokens)]), 1 << 10)
    return Wanted(ScheduledSequence(request, 0, 0, list(tokens)), EngineRequest(request, params, 7), depth)


def _expected(decoder: Decoder, wanted: Wanted) -> tuple[int, ...]:
    """The next tokens of the model alone, one at a time."""
    dense = DenseAttention(decoder, len(wanted.request.request.prompt))
    fed, drawn = list(wanted.sequence.tokens), list[int]()
    for _ in range(wanted.depth):
        with torch.inference_mode():
            logits = dense.run(fed)[-1:]
        at = len(wanted.sequence.tokens) - len(wanted.request.request.prompt) + len(drawn)
        params = wanted.request.params
        row = RowSampling(temperature=params.temperature or 0, top_k=params.top_k or 0, seed=7, position=at)
        (token,) = sample(logits, [row]).tokens
        assert token is not None
        drawn.append(token)
        fed = [token]
    return tuple(drawn)


def _tokens(count: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(3, 101), k=count)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_are_what_the_model_says(decoder: Decoder, params: SamplingParams) -> None:
    proposer, _ = _proposer(decoder)
    wanted = [_wanted(_tokens(count, count), depth, params) for count, depth in ((1, 3), (17, 1), (40, 5))]
    found = proposer.propose(wanted)
    assert found == [_expected(decoder, each) for each in wanted]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_they_follow_what_was_accepted_and_what_was_not(decoder: Decoder, params: SamplingParams) -> None:
    proposer, _ = _proposer(decoder)
    draw = random.Random(5)
    wanted = [_wanted(_tokens(count, count), 4, params, prompt=3) for count in (5, 18, 33)]
    for _ in range(8):
        asked = [each for each in wanted if draw.random() < 0.8]
        for each, drafts in zip(asked, proposer.propose(asked), strict=True):
            assert drafts == _expected(decoder, each)
            accepted = draw.randrange(len(drafts) + 1)
            each.sequence.tokens += [*drafts[:accepted], draw.randrange(3, 101)]


def test_a_long_prompt_is_read_in_chunks_while_others_go_on(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_model, "CHUNK", 40)
    proposer, _ = _proposer(decoder)
    short, long = _wanted(_tokens(3), 2), _wanted(_tokens(100), 2)
    found = [proposer.propose([long, short]) for _ in range(3)]
    assert [bool(drafts) for drafts, _ in found] == [False, False, True]
    assert [drafts for _, drafts in found] == [_expected(decoder, short)] * 3
    assert found[2][0] == _expected(decoder, long)


def test_what_was_used_longest_ago_is_forgotten_where_there_is_no_room(decoder: Decoder) -> None:
    proposer, _ = _proposer(decoder, pages=3 * 3 * 4)  # four pages of 16 tokens in each layer and head
    one, other = _wanted(_tokens(40, 1), 2), _wanted(_tokens(40, 2), 2)
    for each in (one, other, one, other):
        assert proposer.propose([each]) == [_expected(decoder, each)]


def test_without_room_there_are_no_drafts(decoder: Decoder) -> None:
    proposer, _ = _proposer(decoder, pages=3 * 3 * 2)
    short, long = _wanted(_tokens(9), 2), _wanted(_tokens(60), 2)
    assert proposer.propose([long]) == [()]
    assert proposer.propose([long, short]) in ([(), _expected(decoder, short)], [(), ()])
    proposer.ended(long.sequence)
    assert proposer.propose([short]) == [_expected(decoder, short)]


def test_a_sequence_that_ended_leaves_its_room(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftModelProposer, "_make_room", lambda self: False)
    proposer, _ = _proposer(decoder, pages=3 * 3 * 2)
    for seed in range(4):
        wanted = _wanted(_tokens(20, seed), 1)
        assert proposer.propose([wanted]) == [_expected(decoder, wanted)]
        proposer.ended(wanted.sequence)
        proposer.ended(wanted.sequence)


def test_drafts_end_with_the_context(decoder: Decoder) -> None:
    proposer, _ = _proposer(decoder, context=12)
    near, full = _wanted(_tokens(10), 5), _wanted(_tokens(12), 5)
    found = proposer.propose([near, full])
    assert found == [_expected(decoder, near)[:2], ()]


def test_no_draft_is_outside_of_the_large_vocabulary(decoder: Decoder) -> None:
    wanted = _wanted([5, 6, 7, 5, 6], 5)
    expected = _expected(decoder, wanted)
    limit = sorted(set(expected))[-1]
    proposer, _ = _proposer(decoder, vocabulary=limit)
    assert proposer.propose([wanted])[0] == expected[: expected.index(limit)]
    assert proposer.propose([_wanted([5, limit, 6], 5)]) == [()]


def test_after_a_failure_everything_is_read_again(decoder: Decoder) -> None:
    proposer, port = _proposer(decoder)
    wanted = _wanted(_tokens(20), 3)
    proposer.propose([wanted])
    port.fails = True
    assert proposer.propose([wanted]) == [()]
    port.fails = False
    assert proposer.propose([wanted]) == [_expected(decoder, wanted)]


def test_a_draft_model_that_always_fails_is_given_up(decoder: Decoder) -> None:
    proposer, port = _proposer(decoder)
    wanted = _wanted(_tokens(20), 3)
    port.fails = True
    for _ in range(5):
        assert proposer.propose([wanted]) == [()]
    port.fails = False
    assert proposer.propose([wanted]) == [()]
