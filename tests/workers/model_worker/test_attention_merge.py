"""Attention of a batch over holders that keep dense K and V, against attention by its definition."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

import pytest
import torch
from dense_holders import BOTH, CONFIG, LAYERS, Holder, HolderHere, Model, route

from lamina_protocols.messages.messages import Exchange, Fresh, Query
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.decoder.model import KeyValueReady, QueryReady
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.attention_merge import AttentionMerge
from lamina_workers.model_worker.holder_traffic import query_goes_first
from lamina_workers.model_worker.interface import Waiting, result
from lamina_workers.ports.port import Replies


def run_of(
    merge: AttentionMerge,
    model: Model,
    holders: Sequence[Holder],
    batch: int = 1,
    suspends: bool = True,
    query_first: bool = False,
) -> Generator[Waiting, None, torch.Tensor]:
    routes = {Replies(holder): holder.routes for holder in holders}
    for replies in routes:
        replies.expect(1, batch)
    return merge.run(model.forward(query_first), 1, batch, model.spans, routes, suspends)


SPANS = (Span(20, 1), Span(7, 3), Span(0, 5), Span(33, 1))


def whole(span: Span) -> tuple[int, int] | None:
    return (0, span.start) if span.start else None


def one_holder(spans: Sequence[Span]) -> list[list[Route]]:
    return [[route(i, span, read=whole(span)) for i, span in enumerate(spans)]]


def by_heads(spans: Sequence[Span]) -> list[list[Route]]:
    return [[route(i, span, [head], whole(span)) for i, span in enumerate(spans)] for head in BOTH]


def by_ranges(spans: Sequence[Span]) -> list[list[Route]]:
    """The first holder has the first 5 tokens, the second the rest, and the new ones."""
    return [
        [route(i, span, read=(0, 5), stores=False) for i, span in enumerate(spans) if span.start > 5],
        [route(i, span, read=(5, span.start) if span.start > 5 else whole(span)) for i, span in enumerate(spans)],
    ]


def in_parts(spans: Sequence[Span]) -> list[list[Route]]:
    """One holder, with two parts of each sequence: it answers the same queries twice."""
    first, second = by_ranges(spans)
    return [first + second]


def fused(spans: Sequence[Span]) -> list[list[Route]]:
    return [[route(i, span, read=(0, span.start + span.count)) for i, span in enumerate(spans)]]


def partly_fused(spans: Sequence[Span]) -> list[list[Route]]:
    """Every second span is attended whole by the first holder, the others by the second one and here."""
    (all_fused,), (plain,) = fused(spans), one_holder(spans)
    return [all_fused[::2], plain[1::2]]


def stored_and_attended(spans: Sequence[Span], heads: Sequence[int] = BOTH) -> list[list[Route]]:
    """As in decode: single tokens are attended where they are stored, longer spans' own tokens here."""

    def read(span: Span) -> tuple[int, int] | None:
        return (0, span.start + 1) if span.count == 1 else whole(span)

    return [[route(i, span, heads, read(span)) for i, span in enumerate(spans)]]


def stored_and_attended_by_heads(spans: Sequence[Span]) -> list[list[Route]]:
    return [routes for head in BOTH for routes in stored_and_attended(spans, [head])]


def stored_and_attended_by_ranges(spans: Sequence[Span]) -> list[list[Route]]:
    """The holder of the last range attends the new token too."""
    first, _ = by_ranges(spans)
    last = []
    for i, span in enumerate(spans):
        lo = 5 if span.start > 5 else 0
        end = span.start + (span.count == 1)
        last.append(route(i, span, read=(lo, end) if lo < end else None))
    return [first, last]


CUTS = (
    one_holder,
    by_heads,
    by_ranges,
    in_parts,
    fused,
    partly_fused,
    stored_and_attended,
    stored_and_attended_by_heads,
    stored_and_attended_by_ranges,
)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("query_first", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_it_is_dense_attention_however_kv_is_cut(
    cut: Callable[[Sequence[Span]], list[list[Route]]], query_first: bool, sinks: bool
) -> None:
    model = Model(SPANS, sinks=sinks)
    holders = [Holder(model, routes) for routes in cut(SPANS)]
    run = run_of(AttentionMerge(CONFIG), model, holders, query_first=query_first)
    torch.testing.assert_close(result(run), model.dense(), atol=2e-5, rtol=1e-5)
    assert all(holder.holds(model) for holder in holders)


def test_vectors_that_are_answered_twice_are_merged_one_after_the_other() -> None:
    spans = (Span(20, 1),)  # so few that one pass of the kernel has both answers
    model = Model(spans)
    holder = Holder(model, in_parts(spans)[0])
    torch.testing.assert_close(result(run_of(AttentionMerge(CONFIG), model, [holder])), model.dense())


def test_holders_in_this_process_are_asked_last() -> None:
    model, asked = Model(SPANS), []
    own, other = (kind(model, routes) for kind, routes in zip((HolderHere, Holder), partly_fused(SPANS), strict=True))
    for holder in (own, other):
        holder.send = lambda request, holder=holder, send=holder.send: (asked.append(holder), send(request))[1]
    result(run_of(AttentionMerge(CONFIG), model, [own, other]))
    assert asked == [other, own] * LAYERS


def test_a_batch_without_a_past_asks_nothing() -> None:
    spans = (Span(0, 4), Span(0, 1))
    model = Model(spans, sinks=True)
    holder = Holder(model, one_holder(spans)[0])
    torch.testing.assert_close(result(run_of(AttentionMerge(CONFIG), model, [holder])), model.dense())
    assert {type(request) for request in holder.sent} == {Fresh}


def test_q_k_and_v_travel_together_unless_q_is_sent_early_to_a_holder_that_does_not_need_them() -> None:
    def sent(routes: list[Route], query_first: bool) -> list[type]:
        model = Model(SPANS)
        holder = Holder(model, routes)
        result(run_of(AttentionMerge(CONFIG), model, [holder], query_first=query_first))
        return [type(request) for request in holder.sent]

    (plain,), (whole_rows,) = one_holder(SPANS), fused(SPANS)
    assert sent(plain, query_first=False) == [Exchange] * LAYERS
    assert sent(plain, query_first=True) == [Query, Fresh] * LAYERS
    assert sent(whole_rows, query_first=False) == [Exchange] * LAYERS
    assert sent(whole_rows, query_first=True) == [Exchange] * LAYERS


def test_q_goes_first_where_a_holder_elsewhere_attends_earlier_tokens_alone() -> None:
    model = Model(SPANS)

    def first(cut: Callable[[Sequence[Span]], list[list[Route]]], kind: type[Holder] = Holder) -> bool:
        return query_goes_first({Replies(kind(model, routes)): routes for routes in cut(SPANS)}, len(SPANS))

    assert first(one_holder)
    assert first(by_heads)
    assert first(by_ranges)
    assert not first(one_holder, HolderHere)  # it would attend before k and v are computed
    assert not first(fused)
    assert not first(stored_and_attended_by_heads)
    decode = (Span(20, 1), Span(33, 1))
    ranges = stored_and_attended_by_ranges(decode)
    assert not query_goes_first({Replies(Holder(model, routes)): routes for routes in ranges}, len(decode))
    unread = [route(0, Span(0, 1), read=None)]
    assert not query_goes_first({Replies(Holder(model, unread)): unread}, 1)


def test_a_run_is_suspended_until_the_answer_is_there() -> None:
    model = Model(SPANS)
    holder = Holder(model, one_holder(SPANS)[0])
    holder.silent = True
    run = run_of(AttentionMerge(CONFIG), model, [holder])
    waiting = next(run)
    assert not waiting.over()
    holder.silent = False
    assert waiting.over()
    torch.testing.assert_close(result(run), model.dense(), atol=2e-5, rtol=1e-5)


def test_a_run_waits_itself_when_it_must_not_suspend() -> None:
    model = Model(SPANS)
    holder = Holder(model, one_holder(SPANS)[0])
    holder.silent = True
    run = run_of(AttentionMerge(CONFIG), model, [holder], suspends=False)
    with pytest.raises(StopIteration) as end:
        next(run)
    torch.testing.assert_close(end.value.value, model.dense(), atol=2e-5, rtol=1e-5)


def test_a_holder_here_counts_as_local_and_of_the_others_the_slowest() -> None:
    model, merge = Model(SPANS), AttentionMerge(CONFIG)
    own, remote = partly_fused(SPANS)
    holders = [HolderHere(model, own, seconds=0.5), Holder(model, remote, seconds=2e-9)]
    result(run_of(merge, model, holders))
    assert (merge.times.local, merge.times.remote) == (0.5 * LAYERS, pytest.approx(2e-9 * LAYERS))
    holders = [Holder(model, routes, seconds=s) for routes, s in zip(by_heads(SPANS), (4e-9, 3e-9), strict=True)]
    result(run_of(merge, model, holders))
    assert (merge.times.local, merge.times.remote) == (0.0, pytest.approx(4e-9 * LAYERS))


def test_a_holder_cannot_have_attended_longer_than_it_took_to_answer() -> None:
    """What a worker said of its own time was believed, up to 10^38 seconds, by what divides the work."""
    model, merge = Model(SPANS), AttentionMerge(CONFIG)
    began = time.perf_counter()
    holders = [Holder(model, routes, seconds=3e38) for routes in by_heads(SPANS)]
    result(run_of(merge, model, holders))
    assert 0 < merge.times.remote < time.perf_counter() - began


def test_a_batch_that_no_one_attends_fails() -> None:
    model = Model(SPANS)
    with pytest.raises(HolderFault, match="nothing attends layer 0"):
        result(AttentionMerge(CONFIG).run(model.forward(), 1, 1, [], {}))


def test_a_model_that_skips_its_query_is_an_error() -> None:
    def forward() -> Generator[QueryReady | KeyValueReady, torch.Tensor | None, torch.Tensor]:
        yield KeyValueReady(0, torch.empty(0), torch.empty(0))
        return torch.empty(0)

    with pytest.raises(TypeError, match="QueryReady first"):
        result(AttentionMerge(CONFIG).run(forward(), 1, 1, SPANS, {}))
