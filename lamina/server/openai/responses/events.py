"""The events of a response's stream, in OpenAI's order: each item is added, grows and is done before the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lamina.completions import Completion, TokenEvent
from lamina.server.chat.preparing import PreparedChat
from lamina.server.chat.reply import Part, Reply
from lamina.server.chat.reply_parser import Delta
from lamina.server.http.errors import ApiError
from lamina.server.http.sse import event
from lamina.server.openai.answers import chat_logprob
from lamina.server.openai.responses.response import ResponseObject


class ResponseEvents:
    """Writes the stream of one response. `done` gets the object once the response has ended."""

    def __init__(self, chat: PreparedChat, response: ResponseObject, done: Callable[[dict[str, Any]], None]) -> None:
        self._response = response
        self._done = done
        self._reply = Reply(chat)
        self._open: Part | None = None
        self._output: list[dict[str, Any]] = []  # the items that are done
        self._logprobs: list[dict[str, Any]] = []  # of the open item
        self._held: list[dict[str, Any]] = []  # of tokens whose text is held back
        self._number = 0

    def begin(self) -> bytes:
        """The events before anything is generated."""
        begun = self._response.begun()
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def events(self, events: Sequence[TokenEvent]) -> bytes:
        """The events of further tokens."""
        frames: list[bytes] = []
        for token in events:
            reasoned = self._reply.reasoning_tokens
            deltas = self._reply.take(token)
            if token.logprob is not None and self._reply.reasoning_tokens == reasoned:
                self._held.append(chat_logprob(token.logprob, False))
            for delta in deltas:
                self._add(delta, frames)
        return b"".join(frames)

    def end(self, completions: Sequence[Completion]) -> bytes:
        """The last events."""
        ((sample,),) = (completion.samples for completion in completions)
        frames: list[bytes] = []
        if not self._reply.ended:
            for delta in self._reply.finish(sample):
                self._add(delta, frames)
        reason = self._reply.reason(sample.finish_reason)
        self._close(frames, "completed" if reason in ("stop", "tool_calls") else "incomplete")
        ended = self._response.ended(reason, self._output, self._reply.usage())
        self._done(ended)
        kind = "response.completed" if ended["status"] == "completed" else "response.incomplete"
        frames.append(self._event(kind, response=ended))
        return b"".join(frames)

    def failed(self, error: ApiError) -> bytes:
        """The event of an error in the midst of the stream."""
        ended = self._response.failed(error, self._output)
        self._done(ended)
        return self._event("response.failed", response=ended)

    def _add(self, delta: Delta, frames: list[bytes]) -> None:
        part, text = self._reply.collect(delta)
        if part is not self._open:
            self._close(frames, "completed")
            self._begin(part, frames)
        logprobs, self._held = self._held, []
        if not text:
            return
        name, place = self._names(part)
        more = {"logprobs": logprobs} if part.kind == "content" else {}
        self._logprobs += logprobs
        frames.append(self._event(f"{name}.delta", **place, delta=text, **more))

    def _begin(self, part: Part, frames: list[bytes]) -> None:
        self._open = part
        self._logprobs = []
        item = self._response.item(part, len(self._output), "in_progress")
        frames.append(self._event("response.output_item.added", output_index=len(self._output), item=item))
        if part.kind != "call":
            name, place = self._piece(part)
            frames.append(self._event(f"{name}.added", **place, part=self._response.piece(part, "")))

    def _close(self, frames: list[bytes], status: str) -> None:
        """End the open item."""
        part = self._open
        if part is None:
            return
        self._open = None
        name, place = self._names(part)
        if part.kind == "call":
            frames.append(self._event(f"{name}.done", **place, name=part.name, arguments=part.text))
        else:
            more = {"logprobs": self._logprobs} if part.kind == "content" else {}
            frames.append(self._event(f"{name}.done", **place, text=part.text, **more))
            outer, outer_place = self._piece(part)
            piece = self._response.piece(part, part.text, self._logprobs)
            frames.append(self._event(f"{outer}.done", **outer_place, part=piece))
        item = self._response.item(part, len(self._output), status, self._logprobs)
        frames.append(self._event("response.output_item.done", output_index=len(self._output), item=item))
        self._output.append(item)

    def _names(self, part: Part) -> tuple[str, dict[str, Any]]:
        """What the events of a part's text are called, and the fields that say where it is."""
        place = {"item_id": self._item_id(part), "output_index": len(self._output)}
        if part.kind == "call":
            return "response.function_call_arguments", place
        if part.kind == "content":
            return "response.output_text", place | {"content_index": 0}
        if self._response.summarised:
            return "response.reasoning_summary_text", place | {"summary_index": 0}
        return "response.reasoning_text", place | {"content_index": 0}

    def _piece(self, part: Part) -> tuple[str, dict[str, Any]]:
        """The same of the piece around a text."""
        _, place = self._names(part)
        return "response.reasoning_summary_part" if "summary_index" in place else "response.content_part", place

    def _item_id(self, part: Part) -> str:
        return str(self._response.item(part, len(self._output), "in_progress")["id"])

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)
