"""The simulated cluster: each fault alone changes no token and leaves nothing behind, and a run repeats exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scenario as s
import torch
from checksum_model import ChecksumDecoder, Seen, layer_specs
from scenario import Event, Model, Outcome, Scenario, Setup, Submit, prompt_of, reference_text, run

from lamina_workers.decoder.model import Batch, KeyValueReady, QueryReady, StateReady
from lamina_workers.decoder.sampler import RowSampling, sample

USUAL = Setup(workers=(200, 200), timeout=0.2, lease=0.5, linger=2.0)
CLIENTS = tuple(Submit(0.004 * n, n, 9 + 17 * n, 30, samples=1 + n % 2) for n in range(4))


def checked(setup: Setup, *events: Event) -> Outcome:
    """The outcome of a scenario in which every request must end with its text."""
    found = run(Scenario(7, setup, (*CLIENTS, *events), heals=1.0))
    assert not found.complaints, found.log[-30:]
    for answer in found.answers.values():
        for number, tokens in enumerate(answer.samples):
            due = reference_text(answer.submit, number, setup.model)
            assert tokens == (due[: len(tokens)] if answer.left else due), found.log[-30:]
    return found


FAULTS: dict[str, tuple[Event, ...]] = {
    "killed": (s.KillWorker(0.01, 0),),
    "both killed": (s.KillWorker(0.01, 0), s.KillWorker(0.0101, 1)),
    "machine gone": (s.KillWorker(0.01, 1, back=0.4, silent=True),),
    "killed again and again": tuple(s.KillWorker(0.01 + 0.03 * n, n % 2, back=0.01) for n in range(8)),
    "frozen": (s.Freeze(0.01, 0, 0.6),),
    "frozen for a moment": (s.Freeze(0.01, 0, 0.1),),
    "slow": (s.Slow(0.005, 0, 0.5),),
    "delayed": (s.Delay(0.005, 0, 0.5, 0.003),),
    "cut": (s.Cut(0.01, 0, 0.6),),
    "cut to the worker": (s.Cut(0.01, 0, 0.6, "to worker"),),
    "cut to the engine": (s.Cut(0.01, 1, 0.6, "to engine"),),
    "reset": (s.Reset(0.01, 0),),
    "bit flipped": (s.Flip(0.01, 0, "to worker", 999), s.Flip(0.03, 1, "to engine", 77)),
    "client aborts": (s.Leave(0.01, 1), s.Leave(0.012, 3, sample=1)),
    "client breaks": (s.Leave(0.01, 1, "break"),),
    "drained": (s.Drain(0.01, 0),),
    "joined": (s.Join(0.01, 100),),
    "joined and drained": (s.Join(0.005, 200), s.Drain(0.012, 0), s.Drain(0.013, 1)),
    "engine frozen": (s.FreezeEngine(0.01, 0.7),),
    "engine killed": (s.KillEngine(0.01, back=0.1),),
    "keys lost": (s.Lose(0.005, 0), s.Lose(0.02, 1)),
    "worker fails": (s.Break(0.005, 0, "before"), s.Break(0.01, 1, "after"), s.Break(0.02, 0, "settle")),
    "wall clock jumps": (s.JumpClock(0.01, -3600.0), s.JumpClock(0.02, 86400.0)),
}


@pytest.mark.fault("F01", "F05")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_no_token_and_leaves_nothing_behind(fault):
    found = checked(USUAL, *FAULTS[fault])
    for event in FAULTS[fault]:
        assert found.counts[type(event).__name__]


SETUPS = {
    "by positions": replace(USUAL, shard="sequence"),
    "by both, two lanes": replace(USUAL, shard="heads+sequence", lanes=2),
    "q first": replace(USUAL, query_first=True),
    "two tiers": replace(USUAL, local_tier=True, local_pages=200),
    "drafts": replace(USUAL, drafts=3),
    "prefixes": replace(USUAL, prefix_cache=True),
    "a policy": replace(USUAL, policy="streaming(sink=4, recent=40)"),
    "a window": replace(USUAL, window=21, prefix_cache=True),
    "states": replace(USUAL, states=True, local_tier=True, local_pages=200),
    "states and prefixes": replace(USUAL, states=True, prefix_cache=True, lanes=2),
    "states and replicas of the model": replace(USUAL, states=True, model_workers=2, lanes=2),
    "little memory": replace(USUAL, workers=(100, 100), local_pages=16),
    "a journal": replace(USUAL, journal=True),
    "replicas of the model": replace(USUAL, model_workers=2, lanes=3),
    "replicas of the model, by positions": replace(USUAL, model_workers=3, lanes=2, shard="sequence", journal=True),
    "replicas of KV": replace(USUAL, workers=(300, 300, 300), redundancy="replica"),
    "spares and growth for a few tokens": replace(
        USUAL, workers=(300, 600, 300), redundancy="parity(2)", shard="heads+sequence", eager=True
    ),
    "workers of the previous version": replace(USUAL, workers=(300, 200, 300), old_workers=2, redundancy="replica"),
    "no workers": replace(USUAL, workers=(), local_pages=300, prefix_cache=True),
    "replicas of KV and prefixes": replace(USUAL, redundancy="replica", prefix_cache=True, shard="sequence"),
}


@pytest.mark.parametrize("setup", [s for s in SETUPS if SETUPS[s].model_workers > 1])
def test_replicas_of_the_model_die_and_come_back(setup):
    kills = [s.KillModelWorker(0.01 + 0.02 * n, 1 + n % 2, back=0.01 + 0.1 * (n % 3)) for n in range(6)]
    found = checked(SETUPS[setup], *kills)
    assert found.counts["KillModelWorker"] > 1
    assert found.counts["slices"] > 10


@pytest.mark.parametrize("setup", SETUPS)
def test_setups_survive_deaths(setup):
    moved = [s.Move(0.02, 1.0)] if SETUPS[setup].local_tier else []
    checked(SETUPS[setup], s.KillWorker(0.015, 0, back=0.1), *moved, s.KillWorker(0.2, 1), s.KillEngine(0.03, back=0.1))


def test_kv_outlives_an_engine_with_a_journal():
    """Its workers keep the KV for as long as they linger, and the next engine takes it up: little is computed again."""
    kept, freed = (
        checked(replace(USUAL, journal=True, linger=linger), s.KillEngine(0.03, back=0.2)) for linger in (2.0, 0.0)
    )
    assert kept.counts["frames"] < freed.counts["frames"]


def test_a_run_repeats_exactly():
    once, again = (checked(USUAL, *FAULTS["both killed"], s.Freeze(0.3, 0, 0.5)) for _ in range(2))
    assert once.log == again.log
    assert once.counts == again.counts
    assert once.answers == again.answers


def test_an_idle_engine_notices_that_a_worker_is_gone():
    found = run(Scenario(1, USUAL, (Submit(2.0, 0, 20, 5), s.KillWorker(0.1, 0, back=0.01, silent=True)), heals=1.0))
    assert not found.complaints
    (lost,) = (line for line in found.log if line.endswith("is lost"))
    assert float(lost.split()[0]) < 2.0, "it was noticed by the next request alone"


MODELS = (Model(), Model("streaming(sink=4, recent=16)"), Model(window=21), Model(states=True), Model("", 5, True))


@pytest.mark.parametrize("model", MODELS)
def test_the_text_without_an_engine_is_that_of_attention(model):
    submit = Submit(0.0, 5, 23, 12, samples=2)
    for number in range(2):
        assert reference_text(submit, number, model) == attended_text(submit, number, model)


def attended_text(submit: Submit, number: int, model: Model) -> list[int]:
    """The text of the model with plain softmax attention over all keys, and states token by token."""
    decoder, seen, tokens = ChecksumDecoder(model), list(map(Seen, layer_specs(model))), list(prompt_of(submit))
    for position in range(submit.tokens):
        count = len(tokens)
        forward = decoder.forward(Batch(torch.tensor(tokens), torch.arange(count), torch.tensor([count - 1])))
        try:
            event = next(forward)
            while True:
                if isinstance(event, StateReady):
                    q, k, v = event.x.view(count, 3, 4, 16).unbind(1)
                    states = torch.einsum("thd,the->thde", k, v).cumsum(0)
                    event = forward.send(torch.einsum("thd,thde->the", q, states).reshape(count, -1))
                    continue
                assert isinstance(event, QueryReady)
                mask = torch.full((count, count), -torch.inf)
                for at in range(count):
                    for first, end in seen[event.layer].ranges(at):
                        mask[at, first:end] = 0
                kv = forward.send(None)
                assert isinstance(kv, KeyValueReady)
                scores = torch.einsum("thgd,shd->hgts", event.q.view(count, 4, 2, 16), kv.k) * 0.25 + mask
                event = forward.send(torch.einsum("hgts,shd->thgd", scores.softmax(-1), kv.v).reshape(count, -1))
        except StopIteration as stop:
            logits = stop.value
        row = RowSampling(temperature=1.0, seed=submit.request, sample_index=number, position=position)
        tokens += [token for token in sample(logits, [row]).tokens if token is not None]
    return tokens[submit.prompt :]
