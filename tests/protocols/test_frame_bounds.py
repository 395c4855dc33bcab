"""Frames at their bounds: what is planned up to them can be sent, and answered."""

from __future__ import annotations

import pytest

from lamina_protocols.frames import codec
from lamina_protocols.frames.bounds import MAX_COMMANDED_TOKENS, MAX_OPERATIONS, MAX_PAYLOAD, most_rows, most_tokens
from lamina_protocols.frames.layer_frames import HEAD_SIZE, frames_between
from lamina_protocols.messages import messages as m
from lamina_protocols.messages.layers import LATENT, Index, LayerSpec
from lamina_protocols.messages.routes import HolderBatch, Route, Span
from lamina_workers.decoder.logprobs import PromptTokens
from lamina_workers.model_worker.interface import BatchWork
from lamina_workers.parallel import peer_messages

LARGE = (1 << 62) - 1  # the largest number that a field holds
POSITION = 1 << 24  # of the longest sequence
SPECS = {
    "plain": LayerSpec(0, 32, 8, 128, 128, 0.1),
    "alike": LayerSpec(0, 64, 64, 128, 128, 0.1),
    "latent": LayerSpec(0, 128, 1, 576, 512, 0.1, kind=LATENT),
    "indexed": LayerSpec(0, 16, 2, 64, 64, 0.1, index=Index(128, 4, 16, 4, weighted=True)),
}
ROW = m.Row(LARGE, LARGE - 5, LARGE, (LARGE - 1, LARGE), True, True, LARGE)


def framed(message: m.Message) -> m.Message:
    return codec.decode(bytearray(b"".join(codec.encode(message))))


@pytest.mark.fault("F09")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_announcement_of_all_that_a_batch_may_have_and_its_answer_fit_their_frames(spec: LayerSpec) -> None:
    rows, heads = most_rows([spec]), tuple(range(spec.kv_heads))
    opened = m.Open(LARGE, 3, heads, POSITION, POSITION, "streaming(sink=64, recent=256)")
    operations = (opened,) * MAX_OPERATIONS + (m.Close(LARGE),) * MAX_OPERATIONS  # the plan's beside those that waited
    announcement = m.Announcement(LARGE, LARGE, LARGE, operations, (ROW,) * rows)
    assert framed(announcement) == announcement
    usage = m.Usage(LARGE, LARGE, 0.1, LARGE, 0.1, LARGE, LARGE, LARGE, 0.1)
    ints = (LARGE,) * rows
    answer = m.Announced(LARGE, LARGE, True, (LARGE,) * 64, ints, "", (usage,) * rows, (), ints)
    assert framed(answer) == answer


@pytest.mark.fault("F09")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_commands_to_model_workers_of_all_that_a_batch_may_have_fit_their_frames(spec: LayerSpec) -> None:
    rows, tokens, heads = most_rows([spec]), MAX_COMMANDED_TOKENS, tuple(range(spec.kv_heads))
    row = m.Row(1 << 40, POSITION, 1 << 20, (0, POSITION), True, True, POSITION)
    route = Route(rows, heads, row, (POSITION, POSITION), 3, 1 << 10)
    shares = {1: HolderBatch(LARGE, (), (route,) * (rows // 2)), 2: HolderBatch(LARGE, (), (route,) * (rows // 2))}
    spans = (Span(POSITION, tokens // rows),) * rows
    ids = tuple(range(1 << 20, (1 << 20) + tokens))
    sampled = tuple(range(1 << 16, (1 << 16) + rows))
    scored = (PromptTokens(0, 0, tokens, ids, 20),)
    work = BatchWork(spans, (POSITION,) * rows, ids, sampled, (), scored)
    operations = (m.Open(1 << 40, 0, heads, 0, POSITION),) * MAX_OPERATIONS
    announced = {number: HolderBatch(share.first, operations, share.routes) for number, share in shares.items()}
    for command in (
        peer_messages.start_batch(LARGE, work, shares, range(rows), True),
        peer_messages.execute(LARGE, work),
        peer_messages.Announce(LARGE, True, announced),
    ):
        assert peer_messages.decode(bytearray(b"".join(peer_messages.encode(command)))) == command


@pytest.mark.parametrize(("itemsize", "dtype"), [(2, "b16"), (4, "f32")])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_layers_frames_hold_as_many_tokens_as_a_batch_may_have_and_hardly_more(
    spec: LayerSpec, itemsize: int, dtype: str
) -> None:
    """A prompt of 8,000 tokens failed with latents of 128 heads, in chunks of 8,192; in chunks of 7,281 it would not
    have."""

    def largest(tokens: int) -> int:
        frames = frames_between(tokens * spec.heads, tokens * spec.kv_heads, spec, dtype, dtype)
        return max(frame.size for frame in frames) - HEAD_SIZE

    tokens = most_tokens([spec], itemsize, 64)
    assert largest(tokens) <= MAX_PAYLOAD < largest(tokens + tokens // 50)


def test_the_widest_layer_bounds_a_batch() -> None:
    assert most_tokens(SPECS.values(), 2, 64) == most_tokens([SPECS["latent"]], 2, 64) == 7225
    assert most_tokens([SPECS["plain"]], 4, 1 << 20) < most_tokens([SPECS["plain"]], 4, 64)  # contexts of replicas
