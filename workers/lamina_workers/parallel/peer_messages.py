"""The messages between model worker 0 and the model workers beyond it: one frozen dataclass a message.

A worker connects, sends `Hello`, gets `Begin` with what to load, and sends `Progress` and `Ready`, or `Failed`. From
then on model worker 0 commands, and `Beat` comes again and again over a second channel. `Join`, `Announce`, `Copy`,
`SurveySeat`, `LeaveGroup` and `JoinGroup` have one answer each, in order. A failure of a command that names a batch
comes as a `BatchFailed` of that batch: in the place of the answer where there is one, else by itself. The others have
no answer.

Model worker 0 numbers the batches, and the numbers grow. On a channel messages are frames of `codec`, under tags of
their own, and as strictly checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch

from lamina_protocols.channels.channels import Channel, ChannelClosed, Credentials
from lamina_protocols.channels.control import Features
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.codec import Codec
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Announced, Surveyed
from lamina_protocols.messages.routes import HolderBatch, Span
from lamina_workers.decoder.logprobs import PromptTokens
from lamina_workers.model_worker.interface import BatchWork
from lamina_workers.model_worker.kv_copy import Move

# From a model worker.


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a process: the name that it was given, its versions, and its `features` of `versions`."""

    name: str
    protocol: int
    version: str
    features: Features = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How loading goes: `done` of `total` steps of `what`."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded on `device`, and every command is obeyed from now on."""

    device: str


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not do the last `Begin`, `Join` or `SurveySeat`. `kind` is the error's name."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Joined:
    """The port to holder `number` stands. `capacity` in bytes; `resumed`: the seat still has its KV. `features` are
    those of `versions` that all three sides have."""

    number: int
    capacity: int
    resumed: bool
    features: Features = ()


@dataclass(frozen=True, slots=True)
class Answers:
    """The holders' answers to the announcement of a batch, refusals included, by number."""

    batch: int
    answers: Mapping[int, Announced]


@dataclass(frozen=True, slots=True)
class Sliced:
    """A slice is computed, and leaves this `layer_slices.Context`. `model_seconds` is its time outside of attention,
    `attention_seconds` the rest of it."""

    batch: int
    model_seconds: float
    attention_seconds: float
    hidden: torch.Tensor
    attended: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """The last slice is computed. `tokens` are the likeliest of the rows that need no more, in order, each plus 1; 0
    where a row's logits are not finite. logits: float32 `[n, vocab]`, of the other rows. Seconds as in `Sliced`."""

    batch: int
    model_seconds: float
    attention_seconds: float
    tokens: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Copied:
    """The copy is sent; without `room` at a target nothing of it is."""

    batch: int
    room: bool


@dataclass(frozen=True, slots=True)
class SeatSurveyed:
    """The parts that the seat of holder `number` keeps."""

    number: int
    held: Surveyed


@dataclass(frozen=True, slots=True)
class LeftGroup:
    """It has left the group, and waits for commands: nothing of the earlier ones is under way."""


@dataclass(frozen=True, slots=True)
class JoinedGroup:
    """It is one of the group of that generation; or not, where `reason` says why."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Its process lives."""


@dataclass(frozen=True, slots=True)
class BatchFailed:
    """A batch failed here, and nothing of it counts. `lost` are all holders of this worker that are gone by now.
    `alone`: it was not a holder, but the other ranks that could not be reached."""

    batch: int
    reason: str
    lost: tuple[int, ...]
    alone: bool = False


# From model worker 0.


@dataclass(frozen=True, slots=True)
class Begin:
    """The first command: what the worker is, and what it loads.

    `rank` of `ranks`: with several the worker is a tensor-parallel rank, whose heads `holder` has; with one it is a
    whole replica. `folder` has the model's files, whose fingerprint is `model`; `rope_scaling` is JSON, or empty.
    `packed` and `quantize` as in `Packing`.
    `holder` is the config of its holders, with the heads of this rank; its `kv_memory` is that of a pool in the
    worker's process, which is on `attention_device`. `compile` is of older versions, and False. `engine`, `linger` and
    the three fields that follow are for its seats (see `remote.SeatOptions`, `ChannelOptions`); `epoch` is that of the
    engine. `features` are those of `versions` that both sides have.
    """

    rank: int
    ranks: int
    folder: str
    model: str
    rope_scaling: str
    dtype: str
    packed: bool
    quantize: str
    device: str
    attention_device: str
    compile: bool
    threads: int
    holder: HolderConfig
    patience: float
    engine: str
    linger: float
    local_channel: bool
    data_channel: str
    lost_after: float
    epoch: int
    features: Features = ()


@dataclass(frozen=True, slots=True)
class Join:
    """Connect to a seat at the attention worker `name` at `address`: from now on it is holder `number`. Without an
    address it is a new pool in this process. It has `part` of `of` parts of the memory. The last four are credentials.
    """

    number: int
    name: str = ""
    address: str = ""
    seat: int = 0
    part: int = 1
    of: int = 1
    ca: bytes = b""
    cert: bytes = b""
    key: bytes = field(default=b"", repr=False)
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Leave:
    """Let a holder go; harmless where there is none of that number."""

    number: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Announce a batch to the holders concerned, all of this worker. `runs`: unless it is refused it will be executed,
    or dropped."""

    batch: int
    runs: bool
    shares: Mapping[int, HolderBatch]


@dataclass(frozen=True, slots=True)
class Execute:
    """Run the batch that every holder has accepted, with nothing beside it.

    The other fields are those of `BatchWork`, whose sampling stays with model worker 0.
    """

    batch: int
    spans: tuple[Span, ...]
    prompts: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampled: tuple[int, ...]
    scored: tuple[PromptTokens, ...]


@dataclass(frozen=True, slots=True)
class StartBatch:
    """Take part in a batch that model worker 0 has announced under this number: `Slice` commands follow, until the last
    one or `Drop`. `suspends`: other batches may go on while this one waits. `shares` are those of its rows, without
    operations. `plain` are the entries of `sampled` that need nothing but the likeliest token. The rest as in
    `Execute`."""

    batch: int
    suspends: bool
    shares: Mapping[int, HolderBatch]
    plain: tuple[int, ...]
    spans: tuple[Span, ...]
    prompts: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampled: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute slice `number` of a started batch from the context of the slice before, which is empty for the first.
    `last`: the worker attends no further layer of the batch. `Sliced` is the answer, or behind the last attention
    `Chosen`."""

    batch: int
    number: int
    last: bool
    hidden: torch.Tensor
    attended: torch.Tensor


@dataclass(frozen=True, slots=True)
class Drop:
    """A batch that was announced or started goes no further here: a holder has refused it, or others do the rest."""

    batch: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy KV between holders of this worker, as a batch of its own; see `ModelWorker.copy`."""

    batch: int
    moves: tuple[Move, ...]
    shares: Mapping[int, HolderBatch]


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """Whatever is under way is given up."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SurveySeat:
    """Ask for the parts that the seat of holder `number` keeps. Nothing may be under way."""

    number: int


@dataclass(frozen=True, slots=True)
class LeaveGroup:
    """Leave the group of ranks, once whatever is under way has ended or failed."""


@dataclass(frozen=True, slots=True)
class JoinGroup:
    """Join the next group of ranks; see `collectives.Meeting`. `timeout` in seconds."""

    generation: int
    path: str
    host: str
    port: int
    timeout: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Let all holders go and end."""


# A message's tag is its place in its union, so a new one goes to the end.
Command = (
    Begin | Join | Leave | Announce | Execute | StartBatch | Slice | Drop | Copy | BeginEpoch | SurveySeat | LeaveGroup
    | JoinGroup | Stop
)  # fmt: skip
Report = (
    Hello | Progress | Ready | Failed | Joined | Answers | Sliced | Chosen | Copied | SeatSurveyed | LeftGroup
    | JoinedGroup | BatchFailed | Beat
)  # fmt: skip


def join(
    number: int, name: str, address: str, credentials: Credentials | None, seat: int = 0, part: int = 1, of: int = 1
) -> Join:
    """The command to connect to a seat at an attention worker, which these credentials are shown."""
    files = credentials or Credentials()
    return Join(number, name, address, seat, part, of, files.ca, files.cert, files.key, files.token)


def execute(batch: int, work: BatchWork) -> Execute:
    """The command to run `work`, whose sampling stays here."""
    return Execute(batch, work.spans, work.prompts, tuple(work.token_ids), work.sampled, work.scored)


def start_batch(
    batch: int, work: BatchWork, shares: Mapping[int, HolderBatch], plain: Sequence[int], suspends: bool
) -> StartBatch:
    """The command to take part in `work`, whose sampling stays here but for the `plain` rows."""
    routes_only = {
        number: HolderBatch(share.first, (), share.routes) for number, share in shares.items() if share.routes
    }
    return StartBatch(
        batch, suspends, routes_only, tuple(plain), work.spans, work.prompts, tuple(work.token_ids), work.sampled
    )


def work_of(command: Execute | StartBatch) -> BatchWork:
    """The work that is commanded, with no sampling. Raises ProtocolError where its parts contradict each other."""
    spans, token_ids = command.spans, command.token_ids
    scored = command.scored if isinstance(command, Execute) else ()
    tokens = sum(span.count for span in spans)
    if (
        len(token_ids) != tokens
        or len(command.prompts) != len(spans)
        or any(not 0 <= index < tokens for index in command.sampled)
        or any(part.first + part.count > tokens or len(part.targets) not in (0, part.count) for part in scored)
    ):
        raise ProtocolError(
            f"{len(token_ids)} token ids and {len(command.prompts)} prompts for {len(spans)} spans of {tokens} tokens, "
            f"sampled {command.sampled[:8]}, scored {[part.count for part in scored[:8]]}"
        )
    return BatchWork(spans, command.prompts, token_ids, command.sampled, (), scored)


# The tags are none of `codec`'s: a connection to the wrong socket shows in the first frame.
_CODEC = Codec(dict(enumerate(get_args(Report), 101)) | dict(enumerate(get_args(Command), 121)))


def encode(message: Command | Report) -> list[bytes | memoryview]:
    """The frame of a message as buffers; see `codec.Codec`. Raises ProtocolError where it is too large."""
    return _CODEC.encode(message)


def decode(frame: bytearray | memoryview) -> Command | Report:
    """The message of a frame. Raises ProtocolError for anything malformed."""
    message: Command | Report = _CODEC.decode(frame)
    return message


_SENDING_S = 600.0  # while the other side computes it reads nothing


def send(channel: Channel, message: Command | Report, timeout: float = _SENDING_S) -> None:
    """Raises ChannelClosed where the other side was lost, or has not read all of it within `timeout` seconds."""
    try:
        channel.send(encode(message), timeout)
    except TimeoutError as error:  # a part of it is there: nothing can follow
        channel.close()
        raise ChannelClosed(str(error)) from error


def receive(channel: Channel, timeout: float | None = None) -> Command | Report:
    """The next message. Raises as `Channel.receive` and `decode` do."""
    return decode(channel.receive(timeout))
