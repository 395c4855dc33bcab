"""Every policy under an engine: one text for static ones, however prompts are cut and sharded; and under all of them
samples, prefixes, preemption and lost holders, with no token lost or said twice and every page returned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from engine_rig import Rig
from faulty_ports import FaultyPorts
from policy_bench import STATIC, TIGHT, under
from scripted_drafts import Scripted, texts_of

from lamina_protocols.messages.messages import Announcement, Exchange, Fresh
from lamina_workers.decoder.model import Decoder
from lamina_workers.errors import HolderLost
from lamina_workers.policies.catalogue import POLICIES

rng = random.Random(7)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (3, 40, 150)]
GREEDY = {"max_tokens": 24, "temperature": 0}
CHOOSING = [policy for policy in POLICIES if policy not in STATIC]  # the others are models of `test_one_text`
KEEPS_LITTLE = ("streaming", "sharded", "razor", "heavy_hitter")
SHARDS = {
    "heads": {"shard": "heads", "weights": (1, 1)},
    "heads, prompts local": {"shard": "heads", "weights": (1, 1, 1), "local_pool": 500},
    "ranges": {"shard": "sequence", "weights": (1, 2)},
    "heads and ranges": {"shard": "heads+sequence", "weights": (1, 1, 1, 1), "local_pool": 500},
}


@pytest.fixture(scope="module", autouse=True)
def _choosing_is_always_worth_it() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for cost in ("CALL", "BYTE"):
            patch.setattr(f"lamina_workers.policies.retrieval.{cost}", 0)
        yield


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(policy: str, decoder: Decoder) -> Decoder:
    return under(decoder, TIGHT[policy])


@pytest.fixture(scope="module")
def expected(model: Decoder) -> list[list[list[int]]]:
    return said(Rig(model))


def said(rig: Rig, prompts: list[list[int]] = PROMPTS, **sampling: int | float) -> list[list[list[int]]]:
    """The answers of an engine, which is then closed and checked."""
    texts = rig.generate(prompts, **{**GREEDY, **sampling})
    rig.close()
    return texts


def whole(texts: list[list[list[int]]], samples: int = 1, tokens: int = GREEDY["max_tokens"]) -> bool:
    """Whether every sample has all of its tokens, and no more."""
    return all(len(of_prompt) == samples and all(len(text) == tokens for text in of_prompt) for of_prompt in texts)


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks(policy, model, expected, chunk):
    """A static policy gives the same text to its end. A policy that chooses pages does so for the last token of a
    prompt too, when that token is a chunk of its own."""
    got = said(Rig(model, max_batch_tokens=chunk))
    assert whole(got)
    if policy in STATIC:
        assert got == expected


FEW = ["heads", "heads and ranges"]
MANY = [*FEW, *(pytest.param(name, marks=pytest.mark.soak) for name in SHARDS if name not in FEW)]


@pytest.mark.parametrize("policy", CHOOSING, indirect=True)
@pytest.mark.parametrize("placement", MANY)
def test_shards(policy, model, expected, placement):
    """A policy that chooses pages reads prompts exactly, so the first token is the same."""
    got = said(Rig(model, max_batch_tokens=64, **SHARDS[placement]))
    assert whole(got)
    assert [text[0][0] for text in got] == [text[0][0] for text in expected]


def test_samples_and_prefixes(policy, model):
    """Samples fork off one prompt, and the second request off the answer of the first."""
    rig = Rig(model, prefix_cache=True, max_batch_tokens=64)
    first = rig.generate([PROMPTS[2]], **GREEDY, n=1)
    again = rig.generate([PROMPTS[2] + first[0][0] + PROMPTS[1]], **GREEDY, n=1)
    hits = rig.scheduler.counters.reused_tokens
    many = rig.generate([PROMPTS[2]], max_tokens=12, temperature=0.8, seed=3, n=3)
    assert whole(first + again)
    assert whole(many, 3, 12)
    assert hits > 0
    if policy in STATIC:
        alone = Rig(model)
        assert alone.generate([PROMPTS[2] + first[0][0] + PROMPTS[1]], **GREEDY) == again
        alone.close()
    rig.close()


def test_preemption(policy, model):
    """The pages hold four prompts, and not their answers."""
    prompts = [[rng.randrange(101) for _ in range(60)] for _ in range(4)]
    rig = Rig(model, pages=9 * 20, max_batch_tokens=64)
    got = rig.generate(prompts, **GREEDY | {"max_tokens": 50})
    assert rig.scheduler.counters.preempted > 0 or policy in KEEPS_LITTLE
    rig.close()
    assert whole(got, tokens=50)
    if policy in STATIC:
        assert got == said(Rig(model), prompts, max_tokens=50)


@pytest.mark.parametrize("policy", CHOOSING, indirect=True)
@pytest.mark.parametrize("death", [90, *(pytest.param(n, marks=pytest.mark.soak) for n in (12, 61, 140))])
@pytest.mark.parametrize("placement", MANY)
def test_a_lost_holder(policy, model, placement, death):
    """The holder that takes over computes the lost KV again."""
    mortal = FaultyPorts(death, HolderLost("killed"), (Announcement, Exchange, Fresh))
    rig = Rig(model, port=mortal, max_batch_tokens=64, **SHARDS[placement])
    got = said(rig)
    assert len(mortal.struck) == 1
    assert whole(got)


@pytest.mark.parametrize("shard", [{}, SHARDS["heads"], SHARDS["ranges"]], ids=["one holder", "heads", "ranges"])
def test_drafts_keep_the_text_of_static_policies_and_lose_no_token_of_others(policy, model, expected, shard):
    """Rows whose policy chooses get none; those of static policies do."""
    proposer = Scripted(texts_of(PROMPTS, expected), "some", model.config.vocab_size)
    rig = Rig(model, proposer=proposer, prefix_cache=True, **shard)
    for _ in range(2):
        got = rig.generate(PROMPTS, **GREEDY)
        assert [[len(sample) for sample in samples] for samples in got] == [[24]] * len(PROMPTS)
        assert got == expected or policy not in STATIC
    assert (rig.engine._drafting.counts.drafts > 0) == (policy in STATIC)
    rig.close()


def counted(rig: Rig) -> tuple[float, float]:
    """The bytes of KV that decode has read, and those that reading everything would have taken."""
    rig.generate(PROMPTS, **GREEDY)
    stats = rig.engine._stats
    read = stats.kv_read, stats.kv_whole
    rig.close()
    return read


@pytest.mark.parametrize("placement", ["heads", "heads, prompts local"])
def test_what_is_read_is_counted_alike_wherever_it_lies(policy, model, placement):
    """Alone and at two holders; by heads each choice is the same, so its bytes are too."""
    alone, apart = counted(Rig(model)), counted(Rig(model, **SHARDS[placement]))
    assert alone[1] == apart[1] or policy == "full"
    assert alone[0] == pytest.approx(apart[0], rel=0.02)
