"""From replies to Anthropic's messages, whole and as the events of a stream, in Anthropic's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina.completions import Completion, Sample, TokenEvent
from lamina.server.anthropic.conversation import signature
from lamina.server.chat.formats.reply_parser import Delta
from lamina.server.chat.preparing import PreparedChat
from lamina.server.chat.reply import FinishReason, Reply, ReplyPart, ReplyUsage
from lamina.server.http.errors import ApiError
from lamina.server.http.limits import parse_object
from lamina.server.http.sse import event

PING = event({"type": "ping"}, "ping")


class MessageWriter:
    """Writes one message. `omitted`: blocks of thinking have no text."""

    def __init__(self, chat: PreparedChat, message_id: str, model: str, omitted: bool) -> None:
        self._chat = chat
        self._omitted = omitted
        self._reply = Reply(chat)
        self._open: ReplyPart | None = None
        self._index = -1  # of the block that is open or was last
        self._fields: dict[str, Any] = {"id": message_id, "type": "message", "role": "assistant", "model": model}

    def whole(self, sample: Sample) -> dict[str, Any]:
        """The message of a sample that has ended."""
        reply = self._reply
        for delta in reply.finish(sample):
            reply.collect(delta)
        content = [self._block(part) for part in reply.parts]
        return self._fields | {"content": content} | self._ended(sample) | {"usage": _usage(reply.usage())}

    def begin(self) -> bytes:
        fields: dict[str, Any] = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(self._reply.usage()),
        }
        return _event("message_start", message=self._fields | fields) + PING

    def events(self, events: Sequence[TokenEvent]) -> bytes:
        frames: list[bytes] = []
        for token in events:
            self._add(self._reply.take(token), frames)
        return b"".join(frames)

    def end(self, completions: Sequence[Completion]) -> bytes:
        ((sample,),) = (completion.samples for completion in completions)
        frames: list[bytes] = []
        if not self._reply.ended:
            self._add(self._reply.finish(sample), frames)
        self._close(frames)
        frames.append(_event("message_delta", delta=self._ended(sample), usage=_usage(self._reply.usage())))
        frames.append(_event("message_stop"))
        return b"".join(frames)

    @staticmethod
    def failed(error: ApiError) -> bytes:
        return event(error.anthropic, "error")

    def _ended(self, sample: Sample) -> dict[str, Any]:
        reason = _stop_reason(self._reply.reason(sample.finish_reason), sample.stop_string, self._chat.filled)
        return {"stop_reason": reason, "stop_sequence": sample.stop_string}

    def _add(self, deltas: Sequence[Delta], frames: list[bytes]) -> None:
        for delta in deltas:
            part, text = self._reply.collect(delta)
            if part is not self._open:
                self._close(frames)
                self._open = part
                self._index += 1
                block = self._block(ReplyPart(part.kind, part.id, part.name), ended=False)
                frames.append(_event("content_block_start", index=self._index, content_block=block))
            if not text or (part.kind == "reasoning" and self._omitted):
                continue
            kind, field = _DELTAS[part.kind]
            frames.append(_event("content_block_delta", index=self._index, delta={"type": kind, field: text}))

    def _close(self, frames: list[bytes]) -> None:
        part, self._open = self._open, None
        if part is None:
            return
        if part.kind == "reasoning":
            signed = {"type": "signature_delta", "signature": signature(part.text, self._omitted)}
            frames.append(_event("content_block_delta", index=self._index, delta=signed))
        frames.append(_event("content_block_stop", index=self._index))

    def _block(self, part: ReplyPart, ended: bool = True) -> dict[str, Any]:
        if part.kind == "content":
            return {"type": "text", "text": part.text}
        if part.kind == "call":
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": _arguments(part.text)}
        signed = signature(part.text, self._omitted) if ended else ""
        return {"type": "thinking", "thinking": "" if self._omitted else part.text, "signature": signed}


_DELTAS = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _stop_reason(reason: FinishReason, stopped: str | None, filled: bool) -> str:
    if reason == "tool_calls":
        return "tool_use"
    if reason == "length":
        return "model_context_window_exceeded" if filled else "max_tokens"
    return "end_turn" if stopped is None else "stop_sequence"


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; empty where the reply ended within them, or they are not what a request may have."""
    try:
        return parse_object(text.encode("utf-8", "replace"))
    except ApiError:
        return {}


def _usage(usage: ReplyUsage) -> dict[str, Any]:
    """Anthropic counts what came from the cache beside the input."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
