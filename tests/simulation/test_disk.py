"""A journal on a disk that fails: the engine goes on without it, and the next one is not misled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
from disk import Disk

from lamina.errors import JournalError
from lamina.journal.history import BatchRecord, BatchRow, RequestRecord
from lamina.journal.journal import Facts, Journal
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams

FACTS = Facts("model", 16, "float32", 2)


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.close()


def begun(disk: Disk) -> Journal:
    """A journal with one request."""
    journal = Journal(disk.folder, FACTS, calls=disk)
    request = EngineRequest(Request("a", (1, 2), 9), SamplingParams(max_tokens=9), 0)
    journal.append(RequestRecord.of(request))
    journal.commit()
    return journal


def add(journal: Journal, *tokens: int) -> None:
    row = BatchRow("a", 0, 5, 2 + len(tokens), tokens, None, (None,) * len(tokens))
    journal.append(BatchRecord((row,)))
    journal.commit()


def reopened(journal: Journal, disk: Disk) -> list[list[int]]:
    """The tokens of each request that the next engine finds."""
    journal.close()
    again = Journal(disk.folder, FACTS, calls=disk)
    found = [sample.tokens for each in again.history.requests.values() for sample in each.samples]
    again.close()
    return found


@pytest.mark.parametrize("lost", [0, 1, 11, 30])
def test_a_torn_write_loses_itself_alone(disk: Disk, lost: int) -> None:
    journal = begun(disk)
    add(journal, 7)
    add(journal, 8)
    journal.close()
    disk.tear(lost)
    assert reopened(journal, disk) == [[7, 8] if not lost else [7]]


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_journal_that_cannot_be_written_misleads_nobody(disk: Disk, how: Literal["full", "read-only"]) -> None:
    """On a read-only disk the file cannot even be cut: what it has then is old, and true."""
    journal = begun(disk)
    add(journal, 7)
    disk.fail(how, room=20)
    add(journal, 8)
    assert not journal.on
    assert disk.refused
    add(journal, 9)
    disk.mend()
    assert reopened(journal, disk) == ([] if how == "full" else [[7]])


@pytest.mark.fault("F28")
def test_engines_of_a_full_disk_have_one_id(disk: Disk) -> None:
    """The workers keep the KV of each for the next, which would have to wait a minute for them if it had another id."""
    first = begun(disk)
    add(first, 7)
    first.close()
    disk.fail("full")
    second = Journal(disk.folder, FACTS, calls=disk)
    assert (second.on, second.engine, second.starts) == (False, first.engine, 2)
    assert second.history.requests["a"].samples[0].tokens == [7]
    add(second, 8)
    second.close()
    third = Journal(disk.folder, FACTS, calls=disk)
    assert (third.on, third.engine, third.starts, third.history.requests) == (False, first.engine, 3, {})
    third.close()
    disk.mend()
    fourth = Journal(disk.folder, FACTS, calls=disk)
    assert (fourth.on, fourth.engine, fourth.starts) == (True, first.engine, 4)
    fourth.close()


def test_a_read_only_folder_is_refused(disk: Disk) -> None:
    disk.fail("read-only")
    with pytest.raises(JournalError, match="Read-only"):
        Journal(disk.folder, FACTS, calls=disk)
