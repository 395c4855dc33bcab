"""The sample of a prompt's queries is the same wherever the prompt is attended, and follows the KV of its part."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from engine_rig import LOCAL, BytesPort, Rig
from faulty_ports import FaultyPorts
from kv_pools import pool_of
from policy_bench import under

from lamina.sampling_params import SamplingParams
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.messages.messages import Announcement, Exchange, FetchedSample, Fresh, Reply, Sample
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import Decoder
from lamina_workers.errors import HolderLost

pytest.importorskip("faiss")

rng = random.Random(3)
PROMPT = [rng.randrange(101) for _ in range(150)]
GREEDY = {"max_tokens": 20, "temperature": 0}
POLICY = "retrieval(index=graph, sink=16, recent=16, top=8, least=64)"
HEADS = {"shard": "heads", "weights": (1, 1)}
PLACEMENTS = {
    "heads": HEADS,
    "heads, prompts local": {**HEADS, "local_pool": 500},
    "local tier": {**HEADS, "local_pool": 500, "local_tier": True, "tuner": StepTuner(share=1.0)},
}
Found = dict[tuple[int, int], dict[int, torch.Tensor]]


@pytest.fixture(scope="module")
def model(decoder: Decoder) -> Decoder:
    return under(decoder, "full", POLICY, POLICY)


@pytest.fixture(scope="module")
def expected(model: Decoder) -> Found:
    return sampled(serving(model))


def serving(model: Decoder, **placed: object) -> Rig:
    """An engine that has answered the prompt, whose KV is cached."""
    rig = Rig(model, max_batch_tokens=64, prefix_cache=True, **placed)  # type: ignore[arg-type]
    assert len(rig.generate([PROMPT], **GREEDY)[0][0]) == GREEDY["max_tokens"]
    return rig


def kept(worker: AttentionWorker) -> Iterator[tuple[int, int, int, dict[int, torch.Tensor]]]:
    """What a worker keeps: a part's first position, layer, KV head, and the queries by their position."""
    pool = pool_of(worker)
    for handle, part in pool.store.parts().items():
        for layer in range(len(pool.config.layers)):
            heads, positions, q = pool.reader._samples.between(handle, layer, 0, 1 << 62)
            for number, head in enumerate(heads):
                yield part.lo, layer, head, {p + part.lo: q[i, number] for i, p in enumerate(positions.tolist())}


def sampled(rig: Rig) -> Found:
    """By layer and KV head all that is kept of the queries of a sequence that is cut by heads."""
    rig.close()
    found: Found = {}
    for worker in rig.workers.values():
        for _, layer, head, queries in kept(worker):
            found.setdefault((layer, head), {}).update(queries)
    return found


def alike(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    for cell, queries in expected.items():
        assert found[cell].keys() == queries.keys()
        for position, query in queries.items():
            torch.testing.assert_close(found[cell][position].float(), query.float(), rtol=2e-2, atol=2e-2)


def test_one_holder_samples_its_prompts(expected: Found) -> None:
    assert expected.keys() == {(layer, head) for layer in range(3) for head in (1, 2)}  # the first head keeps none
    assert all(queries.keys() == set(range(0, 149, 2)) for queries in expected.values())  # the last token decodes


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_holders_elsewhere_get_the_same_sample(placement: str, model: Decoder, expected: Found) -> None:
    alike(sampled(serving(model, port=BytesPort, **PLACEMENTS[placement])), expected)


def test_every_range_gets_all_later_queries(model: Decoder) -> None:
    rig = serving(model, port=BytesPort, shard="sequence", weights=(1, 2), max_model_len=200, local_pool=500)
    rig.close()
    begins = set()
    for number, worker in rig.workers.items():
        for lo, _, _, queries in kept(worker):
            assert number != LOCAL
            assert queries.keys() == set(range(lo, 1 + max(queries), 2))
            assert max(queries) in (142, 148)  # of a cached prefix of whole pages, and of the sequence
            begins.add(lo)
    assert len(begins) == 2


def lost(model: Decoder, death: int, **placed: object) -> Rig:
    """As `serving`; the holder that has message number `death` of its kind dies of it."""
    mortal = FaultyPorts(death, HolderLost("killed"), (Announcement, Exchange, Fresh, Sample))
    rig = serving(model, port=mortal, **placed)
    (dead,) = mortal.struck
    for number, port in rig.ports.items():
        if port is dead:
            del rig.workers[number]
    return rig


@pytest.mark.parametrize("death", [9, 40, 90])
def test_a_sample_that_is_lost_is_taken_again(death: int, model: Decoder, expected: Found) -> None:
    found = sampled(lost(model, death, shard="heads", weights=(1, 1, 1), local_pool=500))
    assert found.keys() == expected.keys()
    for cell, queries in expected.items():  # of a rebuild decoded tokens are a prompt's too
        assert queries.keys() <= found[cell].keys()


def moving(rig: Rig, name: str) -> None:
    rig.engine.drain(name).result(timeout=60)


@pytest.mark.parametrize("ends", [lambda rig: moving(rig, "worker-1"), lambda rig: moving(rig, "worker-2")])
def test_a_sample_moves_with_its_part(ends: Callable[[Rig], None], model: Decoder, expected: Found) -> None:
    answers: list[FetchedSample] = []

    def bend(reply: Reply) -> Reply:
        answers.extend([reply] if isinstance(reply, FetchedSample) else [])
        return reply

    def port(worker: AttentionWorker) -> BytesPort:
        return BytesPort(worker, bend=bend)

    rig = Rig(model, max_batch_tokens=64, prefix_cache=True, port=port, **HEADS)  # type: ignore[arg-type]
    _, inbox = rig.submit(PROMPT, SamplingParams(max_tokens=400, temperature=0).with_defaults({}))
    inbox.get(timeout=60)
    ends(rig)
    done = False
    while not done:
        done = any(output.finish_reason is not None for output in inbox.get(timeout=60))
    rig.close()
    assert answers
    holding = [worker for worker in rig.workers.values() if list(kept(worker))]
    assert len(holding) == 1
    found: Found = {}
    for _, layer, head, queries in kept(holding[0]):
        found.setdefault((layer, head), {}).update(queries)
    alike(found, expected)
