"""The records of states against a plain model of what each part remembers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Close, Fork, Open, Row
from lamina_workers.errors import KVError, PoolExhausted, TornParts
from lamina_workers.kv_pages.state_store import NO_RECORD, StateStore

MIXERS = 3
HEADS = 2
SET = MIXERS * HEADS  # pages of a part's records at one position


def store(pages, mixers=MIXERS):
    specs = tuple(LayerSpec(at, HEADS, HEADS, 4, 4, 0.5, kind="lightning") for at in range(mixers))
    return StateStore(HolderConfig(specs, 16, "float32", 0), pages, drafts=4)


def row(handle, start, count, store=True, drafts=False):
    return Row(handle, start, count, (0, start) if start else None, store, chooses=drafts)


def did(kv, operations, rows, ends=True):
    steps = kv.update(operations, rows)
    kv.commit()
    if ends:
        kv.stored(rows)
    return steps


def opened(handle, heads=(0, 1), hi=1000):
    return Open(handle, 0, heads, 0, hi)


@pytest.mark.parametrize(
    ("operations", "rows", "message"),
    [
        ([], [row(1, 9, 1)], r"can start at \(8,\)"),
        ([], [row(1, 7, 1)], r"can start at \(0,\)"),
        ([], [row(1, 8, 1, store=False)], "allowed: one that stores"),
        ([], [row(1, 8, 0)], r"row of part 1 at \[8, 8\)"),
        ([], [row(1, 8, 993)], "ends by 1000"),
        ([], [row(1, 8, 6, drafts=True)], "part 1 with 5 drafts, allowed: 4"),
        ([opened(2)], [row(1, 8, 2, drafts=True), row(2, 0, 1)], "12 pages needed, 6 of 12 are free"),
        ([], [row(1, 8, 1), row(1, 8, 1)], "part 1 has 2 rows"),
        ([], [row(9, 0, 1)], "no part has handle 9"),
        ([Fork(2, 1, 5)], [], r"cannot fork part 1 at 5, it has states at \[0, 8\]"),
        ([Fork(2, 7, 5)], [], "no part has handle 7"),
        ([Fork(1, 1, 8)], [], "handle 1 is in use"),
        ([Open(2, 0, (0, 0), 0, 10)], [], "ascending ones below 2"),
        ([Open(2, 0, (1, 0), 0, 10)], [], "ascending ones below 2"),
        ([Open(2, 0, (-1, 0), 0, 10)], [], "ascending ones below 2"),
        ([Open(2, 0, (2,), 0, 10)], [], "ascending ones below 2"),
        ([Open(2, 0, (), 0, 10)], [], "ascending ones below 2"),
        ([Open(2, 0, (0,), 4, 10)], [], "allowed: from 0"),
        ([Open(2, 0, (0,), 0, 0)], [], "allowed: from 0"),
        ([opened(2), opened(3)], [row(2, 0, 1), row(3, 0, 1), row(1, 8, 1)], "18 pages needed, 6 of 12 are free"),
    ],
)
def test_what_cannot_be_changes_nothing(operations, rows, message):
    kv = store(2 * SET)
    did(kv, [opened(1)], [row(1, 0, 8)])
    with pytest.raises(KVError, match=message):
        kv.update(operations, rows)
    assert list(kv.parts()) == [1]
    assert (kv.part(1).held, kv.part(1).stored, kv.free_pages) == (8, 8, SET)
    kv.check_integrity()


def test_parts_are_bounded():
    kv = store(10)
    with pytest.raises(PoolExhausted, match="is one too many"):
        kv.update([opened(handle) for handle in range(1, 9000)], [])
    wide = store(10, mixers=4096)  # of such a part the tables count: 64 KB with both
    with pytest.raises(PoolExhausted, match="part 911 is one too many"):
        wide.update([opened(handle) for handle in range(1, 2000)], [])
    assert wide.parts() == {}
    wide.check_integrity()


def test_a_row_with_drafts_writes_no_records_but_those_that_it_replays():
    """The first page that a part takes for inputs stays its own."""
    kv = store(4 * SET)
    did(kv, [opened(1)], [row(1, 0, 8)])
    (first,) = did(kv, [], [row(1, 8, 4, drafts=True)])
    assert (first.replay, first.keeps, set(first.target.flat)) == (0, True, {NO_RECORD})
    assert (kv.part(1).held, kv.part(1).before, kv.free_pages) == (8, 8, 2 * SET)
    with pytest.raises(TornParts) as torn:
        kv.update([], [row(1, 13, 1)])
    assert torn.value.starts == (12,)
    (second,) = did(kv, [Fork(2, 1, 8)], [row(1, 10, 3, drafts=True)])
    assert (second.replay, second.keeps, kv.part(1).held, kv.free_pages) == (2, True, 10, SET)
    assert (second.source == first.source).all()
    assert (second.kept == first.kept).all()
    (last,) = did(kv, [], [row(1, 13, 1)])
    assert (last.replay, last.keeps, kv.part(1).held, kv.free_pages) == (3, False, 14, 0)
    assert not kv.follows([row(1, 13, 1)])
    did(kv, [Close(1), Close(2)], [])
    assert kv.free_pages == 4 * SET


class Remembering(RuleBasedStateMachine):
    """Each record's content is what was absorbed before it: the model has that by part and position. A page of inputs
    has what was not absorbed yet, by position."""

    handles = Bundle("handles")

    def __init__(self):
        super().__init__()
        self.kv = store(9 * SET)
        self.arena = np.empty(9 * SET, object)
        self.model = {}  # by handle: heads, {position: text}, held
        self.next = 0

    @rule(target=handles, heads=st.sampled_from([(1,), (0, 1)]))
    def open(self, heads):
        self.next += 1
        did(self.kv, [opened(self.next, heads)], [])
        self.model[self.next] = heads, {0: ""}, 0
        return self.next

    @rule(target=handles, parent=handles, which=st.sampled_from(["before", "stored"]))
    def fork(self, parent, which):
        self.next += 1
        heads, texts, _ = self.model[parent]
        length = getattr(self.kv.part(parent), which)
        did(self.kv, [Fork(self.next, parent, length)], [])
        self.model[self.next] = heads, {0: "", length: texts[length]}, length
        assert not self.kv.part(self.next).last.kept
        return self.next

    @rule(handle=consumes(handles))
    def close(self, handle):
        did(self.kv, [Close(handle)], [])
        del self.model[handle]

    starts = st.tuples(handles, st.sampled_from(["held", "before", "nothing", 1, 2]), st.integers(1, 3), st.booleans())

    @rule(
        asked=st.lists(starts, max_size=3),
        ends=st.booleans(),
        reverts=st.booleans(),
        token=st.sampled_from("abc"),
        forked=st.none() | handles,
        closed=st.none() | handles,
    )
    def batch(self, asked, ends, reverts, token, forked, closed):
        """Rows, and beside them a fork that is not used further, and where the batch is reverted a part that closes."""
        asked = {
            handle: (self.kv.part(handle).held + at if isinstance(at, int) else getattr(self.kv.part(handle), at, 0),
                     count, drafts)
            for handle, at, count, drafts in asked
        }  # fmt: skip
        asked.pop(closed, None)
        rows = [row(handle, start, count, drafts=drafts) for handle, (start, count, drafts) in asked.items()]
        operations = [] if forked is None else [Fork(10_000, forked, self.kv.part(forked).stored), Close(10_000)]
        operations += [Close(closed)] if reverts and closed is not None else []
        torn = [start not in self.model[handle][1] for handle, (start, *_) in asked.items()]
        try:
            steps = self.kv.update(operations, rows)
        except TornParts as error:
            found = [start != at for at, (start, *_) in zip(error.starts, asked.values(), strict=True)]
            assert found == torn
            assert any(torn)
            return
        except PoolExhausted:
            assert self.kv.free_pages < SET * len(rows)
            return
        assert not any(torn)
        if reverts:
            self.kv.revert()
            return
        self.kv.commit()
        for each, step in zip(rows, steps, strict=True):
            heads, texts, _ = self.model[each.handle]
            was = texts[each.start]
            base = each.start - step.replay
            for number, source in enumerate(step.source.flat):
                text = "" if source == NO_RECORD else self.arena[source]
                inputs = self.arena[step.kept.flat[number]] if step.replay else {}
                assert text + "".join(inputs[at] for at in range(base, each.start)) == was
            now = was + token * each.count
            reached = {at: text for at, text in texts.items() if base <= at <= each.start}
            if step.keeps:
                for page in (step.kept if ends else step.kept[:1]).flat:
                    known = self.arena[page] if isinstance(self.arena[page], dict) else {}
                    self.arena[page] = known | {each.start + at: token for at in range(each.count)}
                ahead = {each.start + at: was + token * at for at in range(each.count + 1)}
                now, end = was, each.start
            else:
                end = each.start + each.count
                ahead = {end: now}
            written = step.target if ends else step.target[:1]
            self.arena[written[written >= 0]] = now
            self.model[each.handle] = heads, {0: ""} | reached | (ahead if ends else {}), end
        if ends:
            self.kv.stored(rows)

    @invariant()
    def every_record_says_what_was_absorbed(self):
        """Each part has two sets of records at most, which it uses in turn, and one of inputs."""
        self.kv.check_integrity()
        assert 9 * SET - self.kv.free_pages <= sum(3 * MIXERS * len(heads) for heads, *_ in self.model.values())
        for handle, (heads, texts, held) in self.model.items():
            part = self.kv.part(handle)
            assert (part.heads, part.held) == (heads, held)
            for records in part.written():
                if records.position:
                    assert (self.arena[records.pages] == texts[records.position]).all()
                else:
                    assert (records.pages == NO_RECORD).all()

    def teardown(self):
        did(self.kv, [Close(handle) for handle in self.model], [])
        assert self.kv.free_pages == 9 * SET


TestRemembering = Remembering.TestCase
TestRemembering.settings = settings(  # rules often do not apply to the parts that there are
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
