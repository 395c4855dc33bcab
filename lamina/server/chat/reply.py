"""Replies as they come, without the form of any dialect: deltas, the parts that they add up to, their end and usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lamina.completions import Completion, Sample, TokenEvent
from lamina.server.chat.formats.reply_parser import Delta
from lamina.server.chat.preparing import PreparedChat
from lamina.server.preparation import go_on

Kind = Literal["reasoning", "content", "call"]
FinishReason = Literal["stop", "length", "abort", "tool_calls"]


@dataclass(eq=False, slots=True)
class ReplyPart:
    """A stretch of one kind within a reply. `id` and `name` are a call's, whose text is its arguments' JSON."""

    kind: Kind
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)


class ReplyUsage(NamedTuple):
    """Numbers of tokens. Those `cached` are among the prompt's, those of the `reasoning` among the `completion`."""

    prompt: int
    cached: int
    completion: int
    reasoning: int


class Reply:
    """One sample of a chat, read as it comes."""

    def __init__(self, chat: PreparedChat) -> None:
        self.parts: list[ReplyPart] = []
        """What `collect` has added up, in the order in which it was written."""
        self.tokens = 0
        self.ended = False
        self._chat = chat
        self._parser = chat.plan.parser()
        self._read = 0  # characters of the sample's text

    @property
    def plain(self) -> bool:
        """Whether text is only content, so that nothing is ever held back."""
        return self._parser is None

    @property
    def calls(self) -> int:
        return 0 if self._parser is None else self._parser.calls

    @property
    def reasoning_tokens(self) -> int:
        """How many of the tokens are reasoning."""
        return 0 if self._parser is None else self._parser.reasoning_tokens

    def take(self, event: TokenEvent) -> list[Delta]:
        return self._push(event.text, 1, event.finish_reason is not None)

    def finish(self, sample: Sample) -> list[Delta]:
        """The deltas of what was not taken of a sample that has ended; of all of it, where no event was."""
        return self._push(sample.text[self._read :], len(sample.token_ids) - self.tokens, True)

    def reason(self, ended: str) -> FinishReason:
        """Why the reply ended, by the sample's own reason: calls are for the client to answer."""
        return "tool_calls" if ended == "stop" and self.calls else ended  # type: ignore[return-value]  # the engine's

    def collect(self, delta: Delta) -> tuple[ReplyPart, str]:
        """The part that a delta belongs to, a new one where it begins one, and the text that it adds."""
        kind: Kind = "content" if delta.content is not None else "reasoning" if delta.reasoning is not None else "call"
        last = self.parts[-1] if self.parts else None
        if last is None or last.kind != kind or delta.name is not None:
            last = ReplyPart(kind, delta.id or "", delta.name or "")
            self.parts.append(last)
        text = delta.content or delta.reasoning or delta.arguments
        last.pieces.append(text)
        return last, text

    def usage(self) -> ReplyUsage:
        """The tokens so far, of a chat with one sample."""
        request = self._chat.request
        return ReplyUsage(len(request.request.prompt), request.cached_tokens, self.tokens, self.reasoning_tokens)

    def _push(self, text: str, tokens: int, last: bool) -> list[Delta]:
        self.tokens += tokens
        self._read += len(text)
        self.ended = last
        if self._parser is None:
            return [Delta(content=text)] if text else []
        deltas = self._parser.push(text, tokens) if text or tokens else []
        return [*deltas, *self._parser.finish()] if last else deltas


def replies(chat: PreparedChat, completion: Completion) -> list[Reply]:
    """The replies of a completion, whole and collected, one a sample. For a `PreparationPool`."""
    read = []
    for sample in completion.samples:
        go_on()
        reply = Reply(chat)
        for delta in reply.finish(sample):
            reply.collect(delta)
        read.append(reply)
    return read


def text_of(parts: Sequence[ReplyPart], kind: Kind) -> str:
    """All the text of one kind."""
    return "".join(part.text for part in parts if part.kind == kind)
