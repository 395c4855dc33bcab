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
    return StateStore(HolderConfig(specs, 16, "float32", 0), pages)


def row(handle, start, count, store=True):
    return Row(handle, start, count, (0, start) if start else None, store)


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


class Remembering(RuleBasedStateMachine):
    """Each record's content is what was absorbed before it: the model has that by part and position."""

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
        return self.next

    @rule(handle=consumes(handles))
    def close(self, handle):
        did(self.kv, [Close(handle)], [])
        del self.model[handle]

    starts = st.tuples(handles, st.sampled_from(["held", "before", "nothing"]), st.integers(1, 3))

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
        asked = {handle: (getattr(self.kv.part(handle), at, 0), count) for handle, at, count in asked}
        asked.pop(closed, None)
        rows = [row(handle, start, count) for handle, (start, count) in asked.items()]
        operations = [] if forked is None else [Fork(10_000, forked, self.kv.part(forked).stored), Close(10_000)]
        operations += [Close(closed)] if reverts and closed is not None else []
        torn = [start not in self.model[handle][1] for handle, (start, _) in asked.items()]
        try:
            steps = self.kv.update(operations, rows)
        except TornParts as error:
            found = [start != at for at, (start, _) in zip(error.starts, asked.values(), strict=True)]
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
            for source in step.source.flat:
                assert ("" if source == NO_RECORD else self.arena[source]) == was
            now = was + token * each.count
            written = step.target if ends else step.target[:1]
            self.arena[written] = now
            end = each.start + each.count
            self.model[each.handle] = heads, {0: "", each.start: was} | ({end: now} if ends else {}), end
        if ends:
            self.kv.stored(rows)

    @invariant()
    def every_record_says_what_was_absorbed(self):
        """Each part has two sets of records at most, which it uses in turn."""
        self.kv.check_integrity()
        assert 9 * SET - self.kv.free_pages <= sum(2 * MIXERS * len(heads) for heads, *_ in self.model.values())
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
