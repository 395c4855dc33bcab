"""The messages between model worker 0 and the model workers beyond it as frames, and the way over a channel.

The frames are those of `codec`, under tags of their own, and as strict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from lamina_protocols.channels.channels import Channel
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.codec import Codec
from lamina_protocols.messages.routes import HolderBatch
from lamina_workers.model_worker.interface import BatchWork
from lamina_workers.parallel.peer_messages import Command, Execute, Report, StartBatch


def execute(batch: int, work: BatchWork) -> Execute:
    """The command to run `work`, whose sampling stays here."""
    return Execute(batch, work.spans, work.prompts, tuple(work.token_ids), work.sampled, work.scored)


def start_batch(
    batch: int, work: BatchWork, shares: Mapping[int, HolderBatch], plain: Sequence[int], suspends: bool
) -> StartBatch:
    """The command to take part in `work`, whose sampling stays here but for the `plain` rows."""
    given = {number: HolderBatch(share.first, (), share.routes) for number, share in shares.items() if share.routes}
    return StartBatch(
        batch, suspends, given, tuple(plain), work.spans, work.prompts, tuple(work.token_ids), work.sampled
    )


def work_of(command: Execute | StartBatch) -> BatchWork:
    """The work that is commanded, with no sampling. Raises ProtocolError where its parts contradict each other."""
    spans, token_ids = command.spans, command.token_ids
    scored = command.scored if isinstance(command, Execute) else ()
    tokens = sum(span.count for span in spans)
    if (
        len(token_ids) != tokens
        or len(command.prompts) != len(spans)
        or any(not 0 <= at < tokens for at in command.sampled)
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


def send(channel: Channel, message: Command | Report) -> None:
    """Raises ChannelClosed where the other side is gone."""
    channel.send(encode(message))


def receive(channel: Channel, timeout: float | None = None) -> Command | Report:
    """The next message. Raises as `Channel.receive` and `decode` do."""
    return decode(channel.receive(timeout))
