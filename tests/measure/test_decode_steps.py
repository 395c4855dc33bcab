"""Decode steps: from times of tokens to a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_workers import write_tiny_model

from lamina.completions import TokenEvent
from lamina.errors import EngineError, InvalidRequest
from lamina.measure.hardware.decode_steps import Measured, measure, steady


class Metronome:
    """An engine whose tokens come evenly, all sequences in one step; some sequences begin later than others."""

    def __init__(self, folder: Path, longest: int = 4096) -> None:
        self.model_path, self.max_model_len = folder, longest
        self.asked: list[tuple[int, int, dict[str, object]]] = []

    def stream(self, prompts, **sampling):
        self.asked.append((len(prompts), len(prompts[0]), sampling))
        assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
        assert all(0 <= token < 101 for prompt in prompts for token in prompt)
        for _ in range(sampling["max_tokens"]):
            for at in range(len(prompts)):
                yield TokenEvent("", 1, at)


def test_only_gaps_count_in_which_all_sequences_decode():
    early = [0.0, 1.0, 2.0, 3.0, 3.1, 3.2, 3.3]  # slow while the other's prompt is computed
    late = [3.0, 3.1, 3.2, 3.3, 3.4, 4.0, 5.0]  # and alone at the end
    found = steady([early, late], 100, 4)
    assert found.batch == 2
    assert found.gaps == 6
    assert found.seconds == pytest.approx(0.1)
    assert found.first == 3.0
    # of the early one tokens 5 to 7, which read 104 to 106 keys; of the late one the second to the fourth
    assert found.context == pytest.approx((104 + 105 + 106 + 101 + 102 + 103) / 6)
    assert found.low <= found.seconds <= found.high


def test_tokens_of_one_step_come_together():
    """Steps of 100 ms that give 3, 1, 2 and 3 tokens, each 0.1 ms after the one before: 9 tokens after the first in 4
    steps, so 2.25 a step."""
    times, now = [0.0], 0.0
    for tokens in (3, 1, 2, 3):
        now += 0.1
        times += [now + 1e-4 * number for number in range(tokens)]
    found = steady([times], 100, 4, drafts=True)
    assert (found.gaps, found.tokens) == (4, pytest.approx(2.25))
    assert found.seconds == pytest.approx(0.1)
    assert steady([times], 100, 4).tokens == 1


def test_sequences_that_hardly_decoded_together_say_nothing():
    with pytest.raises(EngineError, match="decoded together for 2 gaps"):
        steady([[0.0, 1.0, 2.0], [1.0, 2.0]], 8, 4)


def test_a_measurement_asks_for_greedy_random_prompts_past_the_end(tmp_path):
    engine = Metronome(write_tiny_model(tmp_path / "m"))
    found = measure(engine, 3, 700, tokens=8, seed=1)
    assert engine.asked == [(3, 700, {"max_tokens": 8 + 2 * 2, "ignore_eos": True, "temperature": 0})]
    assert isinstance(found, Measured)
    assert found.batch == 3
    assert 700 < found.context < 712
    assert found.seconds >= 0


@pytest.mark.parametrize(
    ("batch", "context", "tokens"), [(0, 8, 8), (1, 0, 8), (1, 8, 1), (1, 4090, 8), (16, 4000, 48)]
)
def test_what_the_engine_cannot_take_is_refused_before_it_begins(tmp_path, batch, context, tokens):
    engine = Metronome(write_tiny_model(tmp_path / "m"))
    with pytest.raises(InvalidRequest, match="allowed are"):
        measure(engine, batch, context, tokens=tokens)
    assert not engine.asked
