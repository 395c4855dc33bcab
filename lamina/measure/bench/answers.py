"""One streamed answer as its bytes come: when its chunks came, how it ended or failed. Pure: the caller gives the
times."""

from __future__ import annotations

from array import array

from lamina.errors import ProtocolError
from lamina.measure.bench.sse import DONE, EventStream, Usage, parse, plainly_text

MAX_STREAM = 1 << 28
"""Bytes of one stream."""
MAX_CHUNKS = 1 << 22


class Answer:
    """`chunks`: when each chunk with text came; `ended`: when the last event did. `error` names a failure, `detail` has
    its words. After `done` further bytes are ignored."""

    def __init__(self, sent: float) -> None:
        self.chunks = array("d")
        self.ended = sent
        self.finish = ""
        self.usage = Usage()
        self.error = ""
        self.detail = ""
        self.done = False
        self._stream = EventStream()
        self._length = 0
        self._silent: float | None = None  # the first chunk without text: all tokens of an answer may be special ones

    def take(self, data: bytes, at: float) -> None:
        """Bytes that came at a time. Raises ProtocolError where they are no stream of a completion, or too many."""
        self._length += len(data)
        if self._length > MAX_STREAM or len(self.chunks) > MAX_CHUNKS:
            raise ProtocolError(f"the stream has more than {MAX_STREAM} bytes or {MAX_CHUNKS} chunks")
        if self.done:
            return
        for payload in self._stream.feed(data):
            if plainly_text(payload):
                self.chunks.append(at)
                self.ended = at
            elif payload == DONE or self._ends(payload, at):
                self.done = True
                return

    def close(self) -> None:
        """The stream has ended."""
        if self.error:
            return
        if not self.done and not self.finish:
            self.fail("ended early", "the stream ended without a finish_reason or [DONE]")
        elif not self.chunks and self._silent is not None:
            self.chunks.append(self._silent)
        elif not self.chunks:
            self.fail("no tokens", "the stream had no text")

    def fail(self, error: str, detail: str) -> None:
        self.error, self.detail = error, detail[:300]

    def _ends(self, payload: bytes, at: float) -> bool:
        """Whether nothing counts after this event."""
        chunk = parse(payload)
        if chunk.error:
            self.fail("error in the stream", chunk.error)
            return True
        if chunk.text:
            self.chunks.append(at)
        elif chunk.output and self._silent is None:
            self._silent = at
        self.finish, self.usage, self.ended = chunk.finish or self.finish, chunk.usage or self.usage, at
        return False
