"""Requests of several policies in one engine: each gets the text that it gets alone, wherever its KV is."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_rig import BytesPort, Restless, Rig, collect, one_process
from faulty_ports import FaultyPorts
from scripted_drafts import Scripted, texts_of

from lamina.errors import PolicyError
from lamina.sampling_params import SamplingParams
from lamina_protocols.messages.messages import Announcement, Close, Fork, Open
from lamina_workers.errors import HolderLost

rng = random.Random(11)
CHOOSES = "page_top_k(sink=0, recent=16, budget=0.15, least=1)"
WINDOW = "streaming(sink=4, recent=40)"
MEANS = "razor(sink=16, recent=32, share=0.05)"
SHARDED = "sharded(block=16, local=1, stride=3)"
POLICIES = ("", "full", CHOOSES, WINDOW, MEANS, SHARDED, "page_top_k")
STATIC = ("full", WINDOW, SHARDED)
PROMPT = [rng.randrange(101) for _ in range(150)]
TOKENS = 24
PLACEMENTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "heads on two": {"shard": "heads", "weights": (1, 1)},
    "q first": {"shard": "heads", "weights": (1, 1), "fuses": False, "port": BytesPort},
    "copies of prompts": {"shard": "heads", "weights": (1, 1), "local_pool": 2000},
    "two lanes": {"shard": "heads", "weights": (1,), "lanes": 2, "port": BytesPort},
}


def together(rig: Rig, policies: tuple[str, ...] = POLICIES, **params: Any) -> dict[str, list[int]]:
    """What requests of these policies get at the same time, of one prompt."""
    inboxes = {}
    for policy in policies:
        asked = SamplingParams(max_tokens=TOKENS, policy=policy or None, **params).with_defaults({})
        inboxes[policy] = rig.submit(PROMPT, asked)[1]
    return {policy: collect(inbox)[0] for policy, inbox in inboxes.items()}


def separately(decoder, **placement: Any) -> dict[str, list[int]]:
    """What each gets in an engine of its own, whose own policy it is."""
    texts = {}
    for policy in POLICIES:
        rig = Rig(decoder, policy=policy or CHOOSES, **placement)
        ((texts[policy],),) = rig.generate([PROMPT], max_tokens=TOKENS)
        rig.close()
    return texts


@pytest.fixture(scope="module")
def alone_q_first(decoder) -> dict[str, list[int]]:
    """What is chosen depends on whether a query's own key is among the keys."""
    return separately(decoder, **PLACEMENTS["q first"])


@pytest.fixture(scope="module")
def alone(decoder) -> dict[str, list[int]]:
    texts = separately(decoder)
    assert texts[""] == texts[CHOOSES]
    assert len({tuple(text) for text in texts.values()}) > 4
    return texts


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_each_request_gets_the_text_that_it_gets_alone(
    decoder, alone, alone_q_first, placement: str, prefix_cache: bool
) -> None:
    if placement == "q first":
        alone = alone_q_first
    rig = Rig(decoder, policy=CHOOSES, prefix_cache=prefix_cache, max_batch_tokens=64, **PLACEMENTS[placement])
    assert together(rig) == alone
    if prefix_cache:
        assert together(rig) == alone
        assert rig.scheduler.counters.found_tokens > 6 * 140
    rig.close()


@pytest.mark.parametrize("shard", ["heads", "sequence"])
@pytest.mark.parametrize("moves", [False, True])
def test_texts_of_static_policies_stay_however_kv_is_cut_and_moved(decoder, alone, shard: str, moves: bool) -> None:
    beside: dict[str, Any] = {"local_pool": 2000, "local_tier": True, "tuner": Restless(2)} if moves else {}
    rig = Rig(decoder, policy=CHOOSES, shard=shard, weights=(1, 1), prefix_cache=True, port=BytesPort, **beside)
    for _ in range(2):
        assert together(rig, STATIC) == {policy: alone[policy] for policy in STATIC}
    assert (rig.engine._tiering._migration.sequences > 0) == moves
    rig.close()


def test_an_engine_that_reads_all_serves_policies_that_choose_when_it_keeps_sketches(decoder, alone) -> None:
    rig = Rig(decoder, sketches=True)
    assert together(rig) == alone | {"": alone["full"]}
    rig.close()


@pytest.mark.parametrize("strikes_at", [40, 130])
def test_texts_stay_when_a_worker_is_lost(decoder, alone, strikes_at: int) -> None:
    """But for policies that choose: what is rebuilt reads everything."""
    ports = FaultyPorts(strikes_at, HolderLost("it is gone"))
    rig = Rig(decoder, policy=CHOOSES, shard="heads", weights=(1, 1), max_batch_tokens=64, port=ports)
    texts = together(rig)
    assert {policy: texts[policy] for policy in STATIC} == {policy: alone[policy] for policy in STATIC}
    assert all(len(text) == TOKENS for text in texts.values())
    (lost,) = ports.struck
    rig.workers = {number: rig.workers[number] for number, port in rig.ports.items() if port is not lost}
    rig.close()


def test_pages_of_a_window_are_given_back_although_the_engine_keeps_all(decoder) -> None:
    rig = Rig(decoder)
    asked = SamplingParams(max_tokens=TOKENS, policy=WINDOW).with_defaults({})
    ticket, inbox = rig.submit(PROMPT, asked)
    collect(inbox)
    assert ticket.spared.stats()["kv_held"] < 0.6
    assert ticket.spared.stats()["kv_read"] < 0.4
    rig.close()


def test_what_a_policy_has_decoded_is_not_taken_for_exact(decoder, alone) -> None:
    rig = Rig(decoder, policy=CHOOSES, prefix_cache=True)
    texts = together(rig, ("full", CHOOSES))
    further = PROMPT + texts[CHOOSES]
    wanted = one_process(decoder, [further, [*further, 5]], max_tokens=TOKENS)
    found = rig.scheduler.counters.found_tokens
    assert rig.generate([further], max_tokens=TOKENS, policy="full") == wanted[:1]
    assert rig.scheduler.counters.found_tokens - found <= len(PROMPT)
    rig.generate([further], max_tokens=TOKENS)  # the same policy finds more
    assert rig.scheduler.counters.found_tokens - found > 2 * len(PROMPT)
    assert rig.generate([[*further, 5]], max_tokens=TOKENS, policy="full") == wanted[1:]
    rig.close()


def test_only_requests_whose_policy_allows_it_have_drafts(decoder, alone) -> None:
    proposer = Scripted(texts_of([PROMPT], [[alone["full"]]]), "some", 101)
    rig = Rig(decoder, policy=CHOOSES, proposer=proposer)
    for policy, drafts in (("full", True), ("", False), (WINDOW, True), (MEANS, False)):
        ticket, inbox = rig.submit(PROMPT, SamplingParams(max_tokens=TOKENS, policy=policy or None).with_defaults({}))
        assert collect(inbox) == [alone[policy]]
        assert (ticket.drafted > 0) == drafts
    assert together(rig) == alone
    rig.close()


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ("magic", "there is no policy 'magic'; allowed are full"),
        ("policy.toml", "allowed is name or name"),
        ("streaming(sink=-1)", "sink is -1; allowed is 0"),
        ("auto", r"retrieval\(.*chooses by sketches of pages.*allowed here are static policies.*sketches=True"),
    ],
)
def test_a_policy_that_cannot_be_served_is_refused_at_once(decoder, policy: str, match: str) -> None:
    rig = Rig(decoder)
    with pytest.raises(PolicyError, match=match):
        rig.submit(PROMPT, SamplingParams(policy=policy).with_defaults({}))
    rig.close()


def test_operations_carry_the_policy_as_the_engine_writes_it(decoder) -> None:
    seen: list[Open | Fork] = []

    def note(request: object) -> None:
        if isinstance(request, Announcement):
            seen.extend(each for each in request.operations if not isinstance(each, Close))

    rig = Rig(decoder, policy="retrieval", weights=(1,), prefix_cache=True, port=lambda worker: BytesPort(worker, note))
    for policy in ("auto", "retrieval", "streaming( sink = 4,recent=40 )", "full"):
        rig.generate([PROMPT], max_tokens=2, policy=policy)
    assert [each.policy for each in seen if isinstance(each, Open)] == ["", "streaming(sink=4, recent=40)"]
    assert "full" in [each.policy for each in seen if isinstance(each, Fork)]
    rig.close()
