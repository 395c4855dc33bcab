"""Log probabilities of prompts' tokens, and sums of their hidden states: the same however the prompt is computed."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch
from dense_attention import DenseAttention
from engine_rig import Restless, Rig, tiny_decoder

from lamina.errors import EngineError, InvalidRequest
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina_workers.decoder.logprobs import PromptScores
from lamina_workers.decoder.model import Decoder

PROMPT = tuple(i * 37 % 101 for i in range(70))
OTHER = (*PROMPT[:48], *range(5, 30))

WAYS: dict[str, dict[str, Any]] = {
    "in one process": {},
    "in chunks": {"max_batch_tokens": 16},
    "with a prefix cache": {"prefix_cache": True, "max_batch_tokens": 24},
    "on two workers by heads": {"shard": "heads", "weights": (1, 1), "max_batch_tokens": 24},
    "on two workers by positions": {"shard": "sequence", "weights": (1, 1), "lanes": 2, "max_batch_tokens": 24},
    "with copies": {"shard": "heads", "weights": (1, 1), "local_pool": 500, "lanes": 2},
    "on two tiers": {"shard": "heads", "weights": (1, 1), "local_pool": 500, "local_tier": True},
    "with little room": {"pages": 72, "max_batch_tokens": 24},
}


class Asked:
    """One request, and what came back of it: the `scores` by position, or their sum; tokens and the end."""

    def __init__(self, rig: Rig, prompt: tuple[int, ...], pooled: str = "", **sampling: Any) -> None:
        params = SamplingParams(**({"max_tokens": 0} | sampling)).with_defaults({})
        scored = len(prompt) - 1 if pooled == "last" else None if params.prompt_logprobs is None and not pooled else 0
        self._inbox: queue.SimpleQueue[list[EngineOutput]] = queue.SimpleQueue()
        request = Request(str(id(self)), prompt, params.max_tokens, n=params.n, scored_from=scored, pooled=bool(pooled))
        self.request = EngineRequest(request, params, 0, sink=lambda _, outputs: self._inbox.put(outputs))
        rig.engine.submit(self.request)

    def ended(self) -> Asked:
        self.scores: list[PromptScores] = []
        self.tokens: list[list[int]] = [[] for _ in range(self.request.params.n)]
        open_samples = self.request.params.n
        while open_samples:
            for output in self._inbox.get(timeout=60):
                if output.error is not None:
                    raise output.error
                if output.scores is not None:
                    assert not any(self.tokens), "scores come before tokens"
                    self.scores.append(output.scores)
                if output.token is not None:
                    self.tokens[output.sample].append(output.token)
                open_samples -= output.finish_reason is not None
        return self

    @property
    def chosen(self) -> list[float]:
        """The log probability of each token of the prompt but the first."""
        found: dict[int, float] = {}
        for scores in self.scores:
            found |= {scores.start + at: report.chosen for at, report in enumerate(scores.logprobs)}
        assert list(found) == list(range(len(self.request.request.prompt) - 1))
        return list(found.values())


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> dict[tuple[int, ...], torch.Tensor]:
    """Log probabilities of all tokens after each of a prompt's, `[tokens, vocab]`."""
    return {prompt: DenseAttention(decoder, len(prompt)).run(prompt).log_softmax(-1) for prompt in (PROMPT, OTHER)}


def hidden_states(decoder: Decoder, prompt: tuple[int, ...]) -> torch.Tensor:
    """What leaves the last norm, from the logits: the head has more rows than columns."""
    logits = DenseAttention(decoder, len(prompt)).run(prompt).double()
    head = decoder.head(torch.eye(decoder.config.hidden_size, device=decoder.device)).cpu().double()  # `[d, vocab]`
    return torch.linalg.lstsq(head.T, logits.T).solution.T.float()


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_the_whole_prompt(way: str, decoder: Decoder, expected: Any) -> None:
    rig = Rig(decoder, **WAYS[way])
    try:
        plain = rig.generate([PROMPT], max_tokens=5)[0][0]
        every = [
            *(Asked(rig, prompt, prompt_logprobs=3) for prompt in (PROMPT, OTHER, PROMPT)),
            Asked(rig, PROMPT, prompt_logprobs=0, max_tokens=5, n=3),
        ]
        pooled = [Asked(rig, PROMPT, how) for how in ("mean", "last")]
        for asked in map(Asked.ended, every):
            whole = expected[asked.request.request.prompt][:-1]
            of_next = whole[range(len(whole)), asked.request.request.prompt[1:]]
            assert torch.allclose(torch.tensor(asked.chosen), of_next, atol=1e-4)
        first = every[0]
        reports = [report for scores in first.scores for report in scores.logprobs]
        ranks = [rank for scores in first.scores for rank in scores.ranks]
        whole = expected[PROMPT][:-1]
        assert [len(report.top) for report in reports] == [3] * len(whole)
        for row, report, rank, target in zip(whole, reports, ranks, PROMPT[1:], strict=True):
            assert report.top[0][0] == int(row.argmax())
            assert rank == int((row > row[target]).sum()) + 1
        assert every[-1].tokens == [plain] * 3
        assert every[0].tokens == [[]]
        states = hidden_states(decoder, PROMPT)
        mean, last = ([scores.hidden for scores in asked.ended().scores] for asked in pooled)
        assert torch.allclose(torch.tensor(mean), states.sum(0, keepdim=True), atol=2e-2)
        assert torch.allclose(torch.tensor(last), states[-1:], atol=2e-3)
    finally:
        rig.close()


def test_scores_while_sequences_move_and_are_preempted(decoder: Decoder, expected: Any) -> None:
    rig = Rig(
        decoder, shard="heads", weights=(1, 1), local_pool=40, local_tier=True, tuner=Restless(3), pages=60,
        max_batch_tokens=24, prefix_cache=True,
    )  # fmt: skip
    try:
        every = [Asked(rig, prompt, prompt_logprobs=0, max_tokens=12) for prompt in (PROMPT, OTHER, PROMPT, OTHER)]
        for asked in map(Asked.ended, every):
            whole = expected[asked.request.request.prompt][:-1]
            of_next = whole[range(len(whole)), asked.request.request.prompt[1:]]
            assert torch.allclose(torch.tensor(asked.chosen), of_next, atol=1e-4)
    finally:
        rig.close()


def test_a_prompt_of_one_token_has_no_scores(decoder: Decoder) -> None:
    rig = Rig(decoder)
    try:
        assert Asked(rig, (7,), prompt_logprobs=2).ended().scores == []
        assert (
            Asked(rig, (7,), prompt_logprobs=2, max_tokens=2).ended().tokens[0]
            == rig.generate([[7]], max_tokens=2)[0][0]
        )
        assert len(Asked(rig, (7,), "mean").ended().scores) == 1
    finally:
        rig.close()


def test_a_cached_prefix_serves_all_but_what_is_scored(decoder: Decoder) -> None:
    rig = Rig(decoder, prefix_cache=True)
    try:
        rig.generate([PROMPT], max_tokens=2)
        cached = [Asked(rig, PROMPT, how).ended().request.cached_tokens for how in ("last", "mean")]
        assert cached == [64, 0]
        assert Asked(rig, PROMPT, prompt_logprobs=1).ended().request.cached_tokens == 0
        assert Asked(rig, PROMPT, max_tokens=1).ended().request.cached_tokens == 64
    finally:
        rig.close()


def test_scores_that_are_not_finite_end_the_request() -> None:
    broken = tiny_decoder()
    broken._weights.embedding[50] = torch.nan
    rig = Rig(broken)
    try:
        for fields in ({"prompt_logprobs": 1}, {"pooled": "mean"}):
            with pytest.raises(EngineError, match="not finite"):
                Asked(rig, (1, 50, 2), **fields).ended()
        assert Asked(rig, (1, 2), prompt_logprobs=1).ended().scores
    finally:
        rig.close()


def test_a_model_without_hidden_states_gives_no_embeddings(decoder: Decoder) -> None:
    rig = Rig(decoder)
    try:
        rig.scheduler.config = type(rig.scheduler.config)(
            **{name: getattr(rig.scheduler.config, name) for name in rig.scheduler.config.__slots__} | {"pools": False}
        )
        with pytest.raises(InvalidRequest, match="converted model gives no embeddings"):
            Asked(rig, PROMPT, "last").ended()
        assert Asked(rig, PROMPT, prompt_logprobs=1).ended().scores
    finally:
        rig.close()
