"""The file of the journal: it is read back after any cut, and an error names what is wrong with it."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import JournalError
from lamina.journal.history import (
    FINISHED,
    History,
    KnownSample,
    KvLocation,
    Record,
    RecoveredHolder,
    adoption,
    from_plain,
)
from lamina.journal.journal import Facts, Journal, Run, _packed
from lamina.kv import kv_shares
from lamina_protocols.messages.messages import PartHeld

FACTS = Facts("m" * 8, 16, "float32", 2)
PART = ("127.0.0.1:1", 0, 7, 0, (0, 1), 0, 64)


def request(name: str = "a", n: int = 1, prompt: tuple[int, ...] = (1, 2, 3)) -> Record:
    fields = {"id": name, "prompt": prompt, "max_tokens": 9, "n": n, "salt": ("tenant", ""), "stop_token_ids": ()}
    return from_plain(("request", fields, {"temperature": 0.5, "logit_bias": {3: 1.5}}, 2**64 - 1))


def token(value: int, name: str = "a", sample: int = 0, computed: int = 3, reason: str | None = None) -> Record:
    return from_plain(("batch", ((name, sample, 4, computed, (value,), reason, ((-0.5, ((value, -0.5),)),)),)))


RECORDS: list[Record] = [
    request(),
    from_plain(("kept", "a", 0, (PART,))),
    token(11),
    request("b", n=2),
    from_plain(("batch", (("a", 0, 4, 4, (12,), None, (None,)), ("b", 0, 5, 3, (), None, ())))),
    from_plain(("known", "b", 1, (8, 9), (None, None), None, 6, 2, (PART,))),
    from_plain(("end", "b", ((0, "stop"),))),
    token(13, computed=5),
]


def written(folder: Path, records: list[Record]) -> bytes:
    """The bytes of a journal with these records, whose process has died."""
    journal = Journal(folder, FACTS)
    for record in records:
        journal.append(record)
        journal.commit()
    os.close(journal._lock or 0)
    return (folder / "journal").read_bytes()


def state(journal: Journal) -> Any:
    return journal.history.requests, list(journal.history.finished)


def states(folder: Path) -> list[Any]:
    """What is known after each of the records, the first being none."""
    found = []
    for count in range(len(RECORDS) + 1):
        written(folder / str(count), RECORDS[:count])
        journal = Journal(folder / str(count), FACTS)
        found.append(state(journal))
        journal.close()
    return found


def test_journal_is_read_back_after_its_process_died(tmp_path: Path) -> None:
    written(tmp_path, RECORDS)
    journal = Journal(tmp_path, FACTS)
    known = journal.history.requests["a"]
    assert known.samples[0].tokens == [11, 12, 13]
    assert known.samples[0].logprobs == [(-0.5, ((11, -0.5),)), None, (-0.5, ((13, -0.5),))]
    assert (known.samples[0].handle, known.samples[0].computed, known.samples[0].parts) == (4, 5, (PART,))
    assert known.seed == 2**64 - 1
    assert known.params["logit_bias"] == {3: 1.5}
    assert journal.history.requests["b"].known == {1: [8, 9]}
    assert journal.starts == 2
    assert os.stat(tmp_path / "journal").st_mode & 0o777 == 0o600
    journal.close()


def test_journal_cut_at_any_byte_keeps_its_whole_records(tmp_path: Path) -> None:
    """A file that is cut at any byte has exactly its whole records."""
    whole = written(tmp_path / "whole", RECORDS)
    sizes = [len(written(tmp_path / f"first-{count}", RECORDS[:count])) for count in range(len(RECORDS) + 1)]
    expected = states(tmp_path)
    folder = tmp_path / "cut"
    for size in range(len(whole)):
        folder.mkdir(exist_ok=True)
        (folder / "journal").write_bytes(whole[:size])
        journal = Journal(folder, FACTS)
        count = sum(each <= size for each in sizes[1:])
        assert state(journal) == expected[count], size
        assert journal.starts == (2 if size >= sizes[0] else 1)
        journal.close()


@pytest.mark.fault("F08")
def test_journal_names_the_byte_of_a_flipped_bit(tmp_path: Path) -> None:
    whole = written(tmp_path, RECORDS)
    last = len(written(tmp_path / "all but one", RECORDS[:-1]))
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        (tmp_path / "journal").write_bytes(damaged)
        if at >= last + 8:  # the last record is dropped, as after the death of a machine
            journal = Journal(tmp_path, FACTS)
            assert journal.history.requests["a"].samples[0].tokens == [11, 12]
            journal.close()
            continue
        with pytest.raises(JournalError, match=r"journal is damaged at byte \d+|format") as caught:
            Journal(tmp_path, FACTS)
        assert str(tmp_path / "journal") in str(caught.value)


def test_journal_ignores_zeros_at_its_end(tmp_path: Path) -> None:
    whole = written(tmp_path, RECORDS)
    (tmp_path / "journal").write_bytes(whole + bytes(4096))
    journal = Journal(tmp_path, FACTS)
    assert journal.history.requests["a"].samples[0].tokens == [11, 12, 13]
    journal.close()


def test_journal_refuses_a_record_of_absurd_length(tmp_path: Path) -> None:
    import struct
    import zlib

    whole = written(tmp_path, RECORDS)
    length = 3 << 30
    head = struct.pack("<III", length, zlib.crc32(length.to_bytes(4, "little")), 0)
    (tmp_path / "journal").write_bytes(whole + head + b"x")
    with pytest.raises(JournalError, match=f"byte {len(whole)}: a record of {length} bytes"):
        Journal(tmp_path, FACTS)


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        (Facts("other", 16, "float32", 2), ["model", "'mmmmmmmm'", "'other'"]),
        (Facts("m" * 8, 32, "float32", 2), ["page_size", "16", "32"]),
        (Facts("m" * 8, 16, "int8", 2), ["kv_dtype", "'float32'", "'int8'"]),
        (Facts("m" * 8, 16, "float32", 3), ["layers", "2", "3"]),
        (Facts("m" * 8, 16, "float32", 2, policies="x"), ["policies", "'full'", "'x'"]),
    ],
)
def test_journal_of_another_model_is_refused(tmp_path: Path, facts: Facts, names: list[str]) -> None:
    before = written(tmp_path, RECORDS)
    with pytest.raises(JournalError) as caught:
        Journal(tmp_path, facts)
    assert all(name in str(caught.value) for name in names)
    assert (tmp_path / "journal").read_bytes() == before
    Journal(tmp_path, FACTS).close()  # the folder is free again


def test_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    for content in (b"something else", b"lamina journal\r\n" + b"\1" * 40, b"lamina journal\n"):
        (tmp_path / "journal").write_bytes(content)
        with pytest.raises(JournalError, match="damaged"):
            Journal(tmp_path, FACTS)


@pytest.mark.fault("F28")
def test_second_engine_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first = Journal(tmp_path, FACTS)
    code = "import sys; from lamina.journal.journal import *; Journal(sys.argv[1], Facts('mmmmmmmm', 16, 'float32', 2))"
    second = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"in use by process {os.getpid()};" in second.stderr
    with pytest.raises(JournalError, match="in use"):
        Journal(tmp_path, FACTS)
    first.append(request())
    first.close()
    again = Journal(tmp_path, FACTS)
    assert "a" in again.history.requests
    assert again.engine == first.engine
    again.close()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """A folder of mode 0777 was used, so that others could put links and a journal of their own into it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for mode in (0o777, 0o1777, 0o770):
        folder.chmod(mode)
        with pytest.raises(JournalError, match=rf"shared.*with mode {mode:04o}; allowed is one of this user"):
            Journal(folder, FACTS)
    assert list(folder.iterdir()) == []
    folder.chmod(0o755)
    Journal(folder, FACTS).close()


def test_a_journal_that_another_may_write_to_is_refused(tmp_path: Path) -> None:
    """A forged journal was taken up, other tenants' requests and all, since a checksum is no signature."""
    written(tmp_path, RECORDS)
    (tmp_path / "journal").chmod(0o666)
    with pytest.raises(JournalError, match=r"mode 0666"):
        Journal(tmp_path, FACTS)


@pytest.mark.parametrize("name", ["journal", "journal.new", "lock"])
def test_planted_links_lead_nowhere(tmp_path: Path, name: str) -> None:
    """The file behind a planted journal.new was overwritten and became the journal, readable by everybody."""
    (theirs := tmp_path / "theirs").write_bytes(b"precious")
    theirs.chmod(0o644)
    (folder := tmp_path / "folder").mkdir()
    (folder / name).symlink_to(theirs)
    if name == "journal.new":
        Journal(folder, FACTS).close()
        assert not (folder / "journal").is_symlink()
        assert (folder / "journal").stat().st_mode & 0o777 == 0o600
    else:
        with pytest.raises(JournalError, match="symbolic links"):
            Journal(folder, FACTS)
    assert theirs.read_bytes() == b"precious"


def test_a_pipe_in_the_place_of_a_journal_is_not_waited_for(tmp_path: Path) -> None:
    """An engine waited for ever for somebody to write into it."""
    os.mkfifo(tmp_path / "journal", 0o600)
    with pytest.raises(JournalError, match="it is no regular file"):
        Journal(tmp_path, FACTS)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"n": 1 << 62}, "4611686018427387904 samples, allowed: 1 to 256"),
        ({"n": "x"}, "does not fit"),
        ({"of_a_later_version": 1}, "unexpected keyword argument 'of_a_later_version'"),
    ],
)
def test_a_request_that_this_version_cannot_read_is_named(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    """So many samples were made until memory ended; a field of another version ended the start with a TypeError."""
    content = _packed(
        ("request", {"id": "a", "prompt": (1,), "max_tokens": 9, "n": 1, "stop_token_ids": ()} | changed, {}, 1)
    )
    (tmp_path / "journal").write_bytes(written(tmp_path, []) + content)
    with pytest.raises(JournalError, match=why):
        Journal(tmp_path, FACTS)


def test_run_keeps_its_name_and_count_when_it_began_elsewhere(tmp_path: Path) -> None:
    elsewhere = Run("a" * 32, 3)
    first = Journal(tmp_path, FACTS, elsewhere)
    assert (first.engine, first.starts) == ("a" * 32, 4)
    first.close()
    again = Journal(tmp_path, FACTS, Run("a" * 32, 7))
    assert (again.engine, again.starts) == ("a" * 32, 8)
    again.close()
    later = Journal(tmp_path, FACTS, elsewhere)
    assert later.starts == 9
    later.close()


def test_journal_names_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=str(tmp_path / "file")):
        Journal(tmp_path / "file" / "journal", FACTS)
    (tmp_path / "journal").mkdir()
    with pytest.raises(JournalError, match="cannot be used"):
        Journal(tmp_path, FACTS)


@pytest.mark.fault("F29")
def test_journal_drops_ended_requests_when_it_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.journal.journal._GROWN", 20_000)
    monkeypatch.setattr("lamina.journal.history.FINISHED", 1 << 20)
    journal = Journal(tmp_path, FACTS)
    journal.append(request("long"))
    sizes = []
    for at in range(2000):
        journal.append(token(at, "long"))
        journal.append(request(f"short-{at}"))
        journal.append(token(at, f"short-{at}", reason="stop"))
        journal.commit()
        sizes.append((tmp_path / "journal").stat().st_size)
        assert sizes[-1] == journal.size
    assert any(later < earlier for earlier, later in pairwise(sizes))
    assert max(sizes) < 700_000  # four times what is unfinished or has ended lately
    assert len(journal.history.finished) < 256
    before = state(journal)
    journal.close()
    again = Journal(tmp_path, FACTS)
    assert state(again) == before
    assert again.history.requests["long"].samples[0].tokens == list(range(2000))
    assert not list(tmp_path.glob("*.new"))
    again.close()


def full(journal: Journal) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), journal._file or 0)


def too_large(journal: Journal) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + 5, resource.RLIM_INFINITY))


@pytest.mark.fault("F28")
@pytest.mark.parametrize("fill", [full, too_large])
def test_full_disk_turns_the_journal_off(
    tmp_path: Path, fill: Callable[[Journal], None], caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, FACTS)
    journal.append(request())
    journal.commit()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.ERROR, "lamina"):
        try:
            fill(journal)
            for value in range(5):
                journal.append(token(value))
                journal.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not journal.on
    assert [record.getMessage().count("is off") for record in caplog.records] == [1]
    assert journal.history.requests["a"].samples[0].tokens == list(range(5))
    journal.close()
    if fill is too_large:  # an outdated journal resumes nothing, but workers know the next engine
        again = Journal(tmp_path, FACTS)
        assert (again.engine, again.history.requests) == (journal.engine, {})
        again.close()


def test_record_that_is_no_plain_data_turns_the_journal_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path, FACTS)
    journal.append(from_plain(("request", {"id": "x", "n": 1, "salt": object()}, {}, 0)))
    assert not journal.on
    assert "cannot be written" in caplog.text
    journal.close()


# What the records say.


class Model:
    """What a history must say after the same records, kept in another form."""

    def __init__(self) -> None:
        self.samples: dict[str, list[tuple[list[int], str | None, int, Any]]] = {}
        self.over: set[str] = set()

    def open(self) -> list[tuple[str, int]]:
        return [
            (name, at)
            for name, samples in self.samples.items()
            if name not in self.over
            for at, sample in enumerate(samples)
            if sample[1] is None
        ]


@given(st.data())
def test_history_gives_the_unfinished_requests_of_any_records(data: st.DataObject) -> None:
    history, model = History(), Model()
    for step in range(data.draw(st.integers(0, 40))):
        kinds = ["request", "batch", "kept", "end", "drop"] if model.open() else ["request"]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "request":
            n = data.draw(st.integers(1, 3))
            model.samples[str(step)] = [([], None, 0, ()) for _ in range(n)]
            history.apply(request(str(step), n))
            continue
        name, at = data.draw(st.sampled_from(model.open()))
        tokens, _, computed, parts = model.samples[name][at]
        if kind == "batch":
            rows = []
            for name, at in data.draw(st.lists(st.sampled_from(model.open()), min_size=1, max_size=4, unique=True)):
                tokens, _, _, parts = model.samples[name][at]
                new = data.draw(st.lists(st.integers(0, 9), max_size=3))
                reason = data.draw(st.sampled_from([None, None, "stop", "length"])) if new else None
                rows.append((name, at, 5, step, tuple(new), reason, (None,) * len(new)))
                model.samples[name][at] = (tokens + new, reason, step, parts)
            history.apply(from_plain(("batch", tuple(rows))))
        elif kind == "kept":
            moved = (("there", 0, step, 0, (0,), 0, 64),)
            model.samples[name][at] = (tokens, None, computed, moved)
            history.apply(from_plain(("kept", name, at, moved)))
        elif kind == "end":
            reason = data.draw(st.sampled_from(["abort", "stop"]))
            model.samples[name][at] = (tokens, reason, computed, parts)
            history.apply(from_plain(("end", name, ((at, reason),))))
        else:
            model.over.add(name)
            history.apply(from_plain(("drop", name)))
    again = History()
    for record in history.records():
        again.apply(record)
    for each in (history, again):
        for name, samples in model.samples.items():
            ended = all(reason is not None for _, reason, _, _ in samples)
            gone = name in model.over or (ended and any(reason == "abort" for _, reason, _, _ in samples))
            known = each.find(name)
            assert (known is None) == gone
            if known is None:
                continue
            assert known.open != ended
            assert [(s.tokens, s.reason) for s in known.samples] == [(t, r) for t, r, _, _ in samples]
            if not ended:
                assert [(s.computed, s.parts) for s in known.samples] == [(c, p) for _, _, c, p in samples]


@pytest.mark.parametrize(
    ("received", "missing"),
    [
        ([((), False)], [(0, 5, None, "x"), (0, 6, None, "y"), (0, 7, "stop", "z")]),
        ([((5, 6), False)], [(0, 7, "stop", "z")]),
        ([((5, 6, 7), False)], [(0, None, "stop", None)]),
        ([((5, 6, 7), True)], []),
        ([((5,), True)], []),  # its client ended it, by a stop string
        ([((5, 9), False)], None),
        ([((5, 6, 7, 8), False)], None),
    ],
)
def test_resumption_gives_what_a_client_has_not_received(received: Any, missing: Any) -> None:
    history = History()
    history.apply(request())
    history.apply(from_plain(("known", "a", 0, (5, 6, 7), ("x", "y", "z"), "stop", 0, 0, ())))
    known = history.find("a")
    assert known is not None
    if missing is None:
        with pytest.raises(ValueError, match="others than"):
            known.missing(received)
    else:
        assert known.missing(received) == missing


def test_an_end_that_only_the_client_knows_is_no_resumption() -> None:
    """The journal's last records were lost with its engine: the next one went on with what the client had ended."""
    history = History()
    history.apply(request())
    known = history.find("a")
    assert known is not None
    assert known.missing([((), False)]) == []
    with pytest.raises(ValueError, match="has ended for the client"):
        known.missing([((), True)])


def test_history_keeps_ended_requests_until_a_client_claims_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.journal.history.FINISHED", 100_000)
    history = History()
    history.unclaimed.add("0")
    for at in range(50):
        history.apply(request(str(at)))
        history.apply(from_plain(("end", str(at), ((0, "stop"),))))
    assert history.find("0")
    assert not history.find("1")
    assert history.find("49")
    assert 10 < len(history.finished) < 30


def test_ended_requests_are_kept_by_their_size() -> None:
    """The last 256 were kept whatever their size: 12 MB for each that had 3,840 tokens with 20 log probabilities."""
    reports = tuple((float(at), tuple((token, -float(token + at)) for token in range(20))) for at in range(1000))
    tracemalloc.start()
    history = History()
    for at in range(40):
        history.apply(request(str(at)))
        own = tuple((chosen, tuple((token, value - at) for token, value in top)) for chosen, top in reports)
        history.apply(from_plain(("known", str(at), 0, tuple(range(1000)), own, "stop", 0, 0, ())))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1.5 * FINISHED
    assert history.find("39")
    assert not history.find("0")


A, B = KvLocation("a", 0), KvLocation("b", 0)
TWO = (("a", 0, 1, 0, (0, 1), 0, 999), ("b", 0, 2, 0, (2,), 0, 999))


def held(handle: int, heads: tuple[int, ...], upto: int, floor: int = 0, hi: int = 999) -> dict[int, PartHeld]:
    return {handle: PartHeld(handle, 0, heads, 0, hi, upto, floor)}


@pytest.mark.parametrize(
    ("at_a", "at_b", "computed", "gone"),
    [
        (held(1, (0, 1), 40), held(2, (2,), 40), 40, []),
        (held(1, (0, 1), 41), held(2, (2,), 48), 40, []),  # a batch was in flight
        (held(1, (0, 1), 39), held(2, (2,), 40), 39, []),  # the last layer of a batch is missing
        (held(1, (0, 1), 40), {}, 40, [(2,)]),
        ({}, held(2, (2,), 40), 40, [(0, 1)]),
        ({}, {}, None, []),
        (held(1, (0, 1), 40, hi=1000), held(2, (2,), 40), 40, [(0, 1)]),  # another part of that number
        (held(1, (0, 1), 40, floor=40), held(2, (2,), 40), 40, []),
        (held(1, (0, 1), 45, floor=41), held(2, (2,), 45), None, []),  # a window has moved past
        (held(1, (0, 1), 0), held(2, (2,), 0), None, []),
    ],
)
def test_adoption_takes_the_parts_that_holders_still_have(
    at_a: Any, at_b: Any, computed: int | None, gone: list[tuple[int, ...]]
) -> None:
    sample = KnownSample(tokens=[1] * 11, logprobs=[None] * 11, handle=3, computed=40, parts=TWO)
    adopted = adoption(sample, 30, {A: RecoveredHolder(7, (0,), at_a), B: RecoveredHolder(8, (0,), at_b)})
    if computed is None:
        assert adopted is None
        return
    assert adopted is not None
    assert adopted.kept.computed == computed
    assert [share.heads for share in adopted.kept.layout if share.holder == kv_shares.GONE] == gone
    assert {part.share.holder for part in adopted.parts} <= {7, 8}
    assert len(adopted.parts) + len(gone) == 2


def test_part_that_ended_after_the_journal_wrote_it_is_kept_and_what_follows_is_gone() -> None:
    sample = KnownSample(tokens=[1] * 11, logprobs=[None] * 11, handle=3, computed=40, parts=TWO)
    holders = {A: RecoveredHolder(7, (0,), held(1, (0, 1), 32, hi=32)), B: RecoveredHolder(8, (0,), held(2, (2,), 40))}
    adopted = adoption(sample, 30, holders)
    assert adopted is not None
    assert adopted.kept.computed == 40
    gone = [share for share in adopted.kept.layout if share.holder == kv_shares.GONE]
    assert [(share.heads, share.lo, share.hi) for share in gone] == [((0, 1), 32, 999)]
    assert [part.share.hi for part in adopted.parts] == [32, 999]


def test_adoption_goes_back_to_what_every_part_still_has() -> None:
    sample = KnownSample(tokens=[1] * 11, logprobs=[None] * 11, handle=3, computed=400, parts=TWO)
    at_b = RecoveredHolder(8, (0,), held(2, (2,), 100))
    adopted = adoption(sample, 390, {A: RecoveredHolder(7, (0,), held(1, (0, 1), 400)), B: at_b})
    assert adopted is not None
    assert [(share.holder, share.heads) for share in adopted.kept.layout] == [(7, (0, 1)), (8, (2,))]
    assert adopted.kept.computed == 100
    ranges = (("a", 0, 1, 0, (0,), 0, 64), ("b", 0, 2, 0, (0,), 64, 999))
    sample.parts = ranges
    later = {2: PartHeld(2, 0, (0,), 64, 999, 400, 0)}
    adopted = adoption(
        sample, 390, {A: RecoveredHolder(7, (0,), held(1, (0,), 64, hi=64)), B: RecoveredHolder(8, (0,), later)}
    )
    assert adopted is not None
    assert adopted.kept.computed == 400
    assert len(adopted.parts) == 2


def test_adoption_numbers_heads_within_the_rank() -> None:
    sample = KnownSample(tokens=[1], logprobs=[None], handle=3, computed=40, parts=(("a", 1, 1, 0, (2, 3), 0, 999),))
    found = {KvLocation("a", 1): RecoveredHolder(7, (2,), held(1, (0, 1), 40))}
    assert adoption(sample, 40, found) is not None
    assert adoption(sample, 40, {KvLocation("a", 0): found[KvLocation("a", 1)]}) is None


def test_adoption_leaves_parts_of_pools_that_are_not_there() -> None:
    sample = KnownSample(tokens=[1], logprobs=[None], handle=3, computed=40, parts=(("a", 0, 1, 1, (0,), 0, 999),))
    there = {1: PartHeld(1, 1, (0,), 0, 999, 40, 0)}
    assert adoption(sample, 40, {A: RecoveredHolder(7, (0, 0), there)}) is not None
    assert adoption(sample, 40, {A: RecoveredHolder(7, (0,), there)}) is None
