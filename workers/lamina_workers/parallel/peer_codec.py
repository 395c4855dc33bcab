"""The messages between model worker 0 and the model workers beyond it as frames, and the way over a channel.

The frames are those of `codec`, under tags of their own, and as strict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lamina_protocols import control
from lamina_protocols.channels import Channel
from lamina_protocols.codec import ANNOUNCED, OPERATIONS, PART, ROW, Codec, Layout
from lamina_protocols.errors import ProtocolError
from lamina_protocols.fields import BOOL, BYTES, FLOAT, INT, INTS, RANGE, TEXT, Field, Record, list_of, one_of, record
from lamina_protocols.messages import HolderConfig, Surveyed
from lamina_protocols.routes import HolderBatch, Route, Span
from lamina_workers.model_worker.interface import BatchWork
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.parallel.peer_messages import (
    Announce,
    Answers,
    BatchFailed,
    Begin,
    BeginEpoch,
    Chosen,
    Command,
    Copied,
    Copy,
    Drop,
    Execute,
    Executed,
    Failed,
    Hello,
    Join,
    Joined,
    JoinedGroup,
    JoinGroup,
    Leave,
    LeaveGroup,
    LeftGroup,
    Progress,
    Ready,
    Report,
    SeatSurveyed,
    Slice,
    Sliced,
    StartBatch,
    Stop,
    SurveySeat,
)

MAX_WORKERS = 1024


def execute(batch: int, work: BatchWork, wanted: bool, suspends: bool) -> Execute:
    """The command to run `work`, whose sampling stays here."""
    spans = tuple(span.start for span in work.spans) + tuple(span.count for span in work.spans)
    return Execute(
        batch, wanted, suspends, spans, _as_bytes(work.token_ids), _as_bytes(work.rope_lengths), _as_bytes(work.sampled)
    )


def start_batch(
    batch: int, work: BatchWork, shares: Mapping[int, HolderBatch], plain: Sequence[int], suspends: bool
) -> StartBatch:
    """The command to take part in `work`, whose sampling stays here but for the `plain` rows."""
    given = {number: HolderBatch(share.first, (), share.routes) for number, share in shares.items() if share.routes}
    same = execute(batch, work, wanted=True, suspends=suspends)
    return StartBatch(batch, suspends, given, tuple(plain), same.spans, same.token_ids, same.rope_lengths, same.sampled)


def work_of(command: Execute | StartBatch) -> BatchWork:
    """The work that is commanded, with no sampling. Raises ProtocolError where its parts contradict each other."""
    if len(command.spans) % 2:
        raise ProtocolError(f"{len(command.spans)} numbers of spans, expected pairs")
    half = len(command.spans) // 2
    spans = tuple(Span(start, count) for start, count in zip(command.spans[:half], command.spans[half:], strict=True))
    token_ids, rope_lengths, sampled = map(_as_ints, (command.token_ids, command.rope_lengths, command.sampled))
    tokens = sum(span.count for span in spans)
    if not len(token_ids) == len(rope_lengths) == tokens or any(not 0 <= at < tokens for at in sampled):
        raise ProtocolError(
            f"{len(token_ids)} token ids and {len(rope_lengths)} lengths for spans of {tokens}, sampled {sampled[:8]}"
        )
    return BatchWork(spans, token_ids, rope_lengths, tuple(sampled), ())


def _as_bytes(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64).view(torch.int8).view(len(numbers), 8)


def _as_ints(tensor: torch.Tensor) -> list[int]:
    if tensor.dtype != torch.int8 or tensor.ndim != 2 or tensor.shape[1] != 8:
        raise ProtocolError(f"expected int8 [n, 8], got {tensor.dtype} {list(tensor.shape)}")
    numbers: list[int] = tensor.contiguous().view(torch.int64).view(-1).tolist()
    return numbers


_ROUTE = Record(Route, {"source": INT, "heads": INTS, "row": record(ROW), "stored": Field(tuple, RANGE.unpack)})
_SHARE = Record(HolderBatch, {"first": INT, "operations": one_of(OPERATIONS), "routes": list_of(_ROUTE)})
_MOVE = Record(Move, dict.fromkeys(Move._fields, INT) | {"paged": BOOL})
_SURVEYED = Record(
    Surveyed,
    {"epoch": INT, "batch": INT, "last_epoch": INT, "next_operation": INT, "parts": list_of(PART), "more": INT},
)
_HOLDER = Record(
    HolderConfig,
    {"layers": list_of(control.LAYER), "page_size": INT, "dtype": TEXT, "kv_memory": INT},
)


def _by_number(rec: Record) -> Field:
    """A mapping from holders' numbers, as pairs."""

    def unpack(pairs: object) -> dict[int, object]:
        if type(pairs) is not tuple or len(pairs) > MAX_WORKERS:
            raise ProtocolError(f"expected up to {MAX_WORKERS} pairs of a holder's number and a {rec.cls.__name__}")
        found: dict[int, object] = {}
        for pair in pairs:
            if type(pair) is not tuple or len(pair) != 2:
                raise ProtocolError(f"expected a holder's number and a {rec.cls.__name__}")
            found[INT.unpack(pair[0])] = rec.unpack(pair[1])
        return found

    return Field(lambda mapping: [[number, rec.pack(value)] for number, value in mapping.items()], unpack)


_SHARES = _by_number(_SHARE)
_JOIN = {"number": INT, "name": TEXT, "address": TEXT, "seat": INT, "part": INT, "of": INT}
_SECONDS = {"batch": INT, "model_seconds": FLOAT, "attention_seconds": FLOAT}
_CREDENTIALS = {"ca": BYTES, "cert": BYTES, "key": BYTES, "token": TEXT}
_BEGIN: dict[str, Field] = {
    "rank": INT,
    "ranks": INT,
    "folder": TEXT,
    "model": TEXT,
    "rope_scaling": TEXT,
    "dtype": TEXT,
    "device": TEXT,
    "attention_device": TEXT,
    "compile": BOOL,
    "threads": INT,
    "holder": record(_HOLDER),
    "patience": FLOAT,
    "engine": TEXT,
    "linger": FLOAT,
    "local_channel": BOOL,
    "data_channel": TEXT,
    "lost_after": FLOAT,
    "epoch": INT,
}

_CODEC = Codec(
    {  # the tags are none of `codec`'s: a connection to the wrong socket shows in the first frame
        101: Layout(Hello, {"name": TEXT, "protocol": INT, "version": TEXT}),
        102: Layout(Progress, {"what": TEXT, "done": INT, "total": INT}),
        103: Layout(Ready, {"device": TEXT}),
        104: Layout(Failed, {"kind": TEXT, "reason": TEXT}),
        105: Layout(Joined, {"number": INT, "capacity": INT, "resumed": BOOL}),
        106: Layout(Answers, {"batch": INT, "answers": _by_number(ANNOUNCED)}),
        107: Layout(Executed, {"batch": INT}, ("logits",)),
        108: Layout(Copied, {"batch": INT, "room": BOOL}),
        109: Layout(SeatSurveyed, {"number": INT, "held": record(_SURVEYED)}),
        110: Layout(JoinedGroup, {"generation": INT, "reason": TEXT}),
        112: Layout(LeftGroup, {}),
        113: Layout(Sliced, _SECONDS, ("hidden", "attended")),
        114: Layout(Chosen, _SECONDS | {"tokens": INTS}, ("logits",)),
        111: Layout(BatchFailed, {"batch": INT, "reason": TEXT, "lost": INTS, "alone": BOOL}),
        121: Layout(Begin, _BEGIN),
        122: Layout(Join, _JOIN | _CREDENTIALS),
        123: Layout(Leave, {"number": INT}),
        124: Layout(Announce, {"batch": INT, "runs": BOOL, "shares": _SHARES}),
        125: Layout(
            Execute,
            {"batch": INT, "wanted": BOOL, "suspends": BOOL, "spans": INTS},
            ("token_ids", "rope_lengths", "sampled"),
        ),
        126: Layout(Drop, {"batch": INT}),
        127: Layout(Copy, {"batch": INT, "moves": list_of(_MOVE), "shares": _SHARES}),
        128: Layout(BeginEpoch, {"epoch": INT}),
        129: Layout(SurveySeat, {"number": INT}),
        130: Layout(JoinGroup, {"generation": INT, "path": TEXT, "host": TEXT, "port": INT, "timeout": FLOAT}),
        131: Layout(Stop, {}),
        132: Layout(LeaveGroup, {}),
        133: Layout(
            StartBatch,
            {"batch": INT, "suspends": BOOL, "shares": _SHARES, "plain": INTS, "spans": INTS},
            ("token_ids", "rope_lengths", "sampled"),
        ),
        134: Layout(Slice, {"batch": INT, "number": INT, "last": BOOL}, ("hidden", "attended")),
    }
)


def encode(message: Command | Report) -> list[bytes | memoryview]:
    """The frame of a message as buffers; see `codec.Codec`. Raises ProtocolError where it is too large."""
    return _CODEC.encode(message)


def decode(frame: bytearray | memoryview) -> Command | Report:
    """The message of a frame. Raises ProtocolError for anything malformed."""
    message: Command | Report = _CODEC.decode(frame)
    return message


def send(channel: Channel, message: Command | Report) -> None:
    """Raises ChannelClosed where the other side is gone."""
    channel.send(encode(message))


def receive(channel: Channel, timeout: float | None = None) -> Command | Report:
    """The next message. Raises as `Channel.receive` and `decode` do."""
    return decode(channel.receive(timeout))
