"""`LLM`: a model, its workers and its engine, for Python programs.

Checks what callers pass in and turns it into requests; the asynchronous methods differ from the blocking ones only in
how they wait. Safe to use from several threads and event loops at once.
"""

from __future__ import annotations

import logging
import queue
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from lamina.client.call import Call
from lamina.client.input_processor import Conversation, Prompt, is_one
from lamina.client.loop_queue import AsyncOutputs
from lamina.completions import Completion, Interrupted, TokenEvent
from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.errors import EngineError, InvalidRequest
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.system.progress import Progress
from lamina_workers.devices.openmp import share_cores

if TYPE_CHECKING:
    from lamina.launch.builder import Runtime
    from lamina.ray_engine.handle import ClusterRuntime

logger = logging.getLogger("lamina")


class LLM:
    """A loaded model. Use it as a context manager, or `close` it.

    `model` is an alias (`lamina models ls`), a folder, a GGUF file or a hub id; the keywords are the fields of
    `EngineConfig`. `progress(what, done, total)` is told how downloads, conversion and loading go. Raises
    ModelFileError or UnsupportedModelError for the model, InvalidRequest for the rest.

    `generate` and `chat` give one `Completion` for one prompt or conversation and a list for a list; `stream` and
    `stream_chat` give `TokenEvent`s as they come, and closing the iterator ends the requests. Each takes a
    `SamplingParams` or its fields as keywords, and `priority` (lower is more urgent).
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, *, progress: Progress | None = None, **config: Any) -> None:
        known = EngineConfig.__dataclass_fields__
        for name in config:
            if name not in known:
                raise InvalidRequest(f"unknown keyword {name!r} for LLM; known are {', '.join(known)}")
        runtime = _start(model, EngineConfig(**config), progress)
        self._loaded: Runtime | ClusterRuntime | None = runtime
        self._resumed = False
        self._stop = weakref.finalize(self, runtime.stop)  # once: by close(), by the collector, or when Python ends

    @classmethod
    def from_plan(
        cls, path: str | Path, *, model: str | Path | None = None, progress: Progress | None = None, **overrides: Any
    ) -> LLM:
        """The engine that a plan file (`lamina plan --out`) describes: one replica of it. `model` and fields of
        `EngineConfig` go before the plan's. Raises InvalidRequest where the file is wrong, or no engine does what it
        plans; the rest as `LLM(...)` does."""
        from lamina.simulator.planning.plan_file import read

        plan = read(path)
        keywords = plan.keywords(**overrides)
        for remark in plan.remarks():
            logger.warning("%s: %s", path, remark)
        return cls(plan.model if model is None else model, progress=progress, **keywords)

    @property
    def model_path(self) -> Path:
        """The folder with config.json, safetensors and tokenizer, which transformers loads too."""
        return self._runtime.model_path

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used: the model knows how to write a conversation."""
        return self._runtime.tokenizer.has_chat_template

    @property
    def max_model_len(self) -> int:
        """The most tokens that one prompt and its output can have."""
        return self._runtime.intake.max_model_len

    @property
    def alive(self) -> bool:
        """Whether it can take requests: not closed, and its engine runs."""
        return self._loaded is not None and self._loaded.engine.alive

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt] | Prompt, params: SamplingParams | None = None, *, priority: int = 0,
        **sampling: Any,
    ) -> Completion | list[Completion]: ...  # fmt: skip
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Complete prompts: text or lists of token ids. Ctrl-C raises Interrupted, with what was finished."""
        return self._complete(self._tickets(self._prompts(prompts), params, priority, sampling), is_one(prompts))

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Answer a conversation, a list of {"role": ..., "content": ...}, or each of a list of conversations."""
        tickets = self._tickets(self._conversations(messages), params, priority, sampling)
        return self._complete(tickets, _is_conversation(messages))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> Iterator[TokenEvent]:
        """Like `generate`, token by token. Bad arguments raise here, not at the first token."""
        return self._blocking(self._tickets(self._prompts(prompts), params, priority, sampling))

    def stream_chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> Iterator[TokenEvent]:
        """Like `chat`, token by token."""
        return self._blocking(self._tickets(self._conversations(messages), params, priority, sampling))

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """`generate` for event loops."""
        tickets = self._tickets(self._prompts(prompts), params, priority, sampling)
        return await self._acomplete(tickets, is_one(prompts))

    async def achat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """`chat` for event loops."""
        tickets = self._tickets(self._conversations(messages), params, priority, sampling)
        return await self._acomplete(tickets, _is_conversation(messages))

    def astream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> AsyncIterator[TokenEvent]:
        """`stream` for event loops."""
        return self._awaiting(self._tickets(self._prompts(prompts), params, priority, sampling))

    def astream_chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> AsyncIterator[TokenEvent]:
        """`stream_chat` for event loops."""
        return self._awaiting(self._tickets(self._conversations(messages), params, priority, sampling))

    @property
    def unfinished(self) -> int:
        """How many prompts an engine before, with the same `journal`, had not finished, that `resume` would give."""
        return len(self._runtime.unfinished) if not self._resumed else 0

    def resume(self) -> list[Completion]:
        """The completions of what an engine before, with the same `journal`, had not finished when its process died, in
        the order in which it was asked: whole, with the tokens from before. An empty list the second time."""
        tickets = list(self._runtime.unfinished) if not self._resumed else []
        self._resumed = True
        again = [replace(ticket, received=((((), False),) * ticket.request.n)) for ticket in tickets]
        completed = self._complete(again, one=False)
        return completed if isinstance(completed, list) else [completed]

    def close(self) -> None:
        """Stop the engine and free the model. Harmless the second time; what is unfinished ends with EngineError."""
        self._loaded = None
        self._stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Waiting: the blocking and the asynchronous way.

    def _complete(self, tickets: list[EngineRequest], one: bool) -> Completion | list[Completion]:
        job = Call(self._runtime, tickets, queue.SimpleQueue(), streamed=False)
        try:
            while not job.done:
                job.take(job.inbox.get())
        except KeyboardInterrupt as interrupt:
            while not job.inbox.empty():
                job.take(job.inbox.get())
            raise Interrupted(job.finished()) from interrupt
        finally:
            job.abort()
        return job.completions()[0] if one else job.completions()

    async def _acomplete(self, tickets: list[EngineRequest], one: bool) -> Completion | list[Completion]:
        job = Call(self._runtime, tickets, AsyncOutputs(), streamed=False)
        try:
            while not job.done:
                job.take(await job.inbox.get())
        finally:
            job.abort()
        return job.completions()[0] if one else job.completions()

    def _blocking(self, tickets: list[EngineRequest]) -> Iterator[TokenEvent]:
        job = Call(self._runtime, tickets, queue.SimpleQueue(), streamed=True)
        try:
            while not job.done:
                yield from job.take(job.inbox.get())
        finally:
            job.abort()

    async def _awaiting(self, tickets: list[EngineRequest]) -> AsyncIterator[TokenEvent]:
        job = Call(self._runtime, tickets, AsyncOutputs(), streamed=True)
        try:
            while not job.done:
                for event in job.take(await job.inbox.get()):
                    yield event
        finally:
            job.abort()

    # Checking, and from arguments to requests.

    @property
    def _runtime(self) -> Runtime | ClusterRuntime:
        runtime = self._loaded  # once: another thread may close this LLM
        if runtime is None:
            raise EngineError("this LLM is closed")
        return runtime

    def _tickets(
        self, prompts: list[list[int]], params: SamplingParams | None, priority: int, sampling: Mapping[str, Any]
    ) -> list[EngineRequest]:
        """One request a prompt, checked but not submitted."""
        if params is not None and sampling:
            raise InvalidRequest(f"both params and {', '.join(sampling)} were given; allowed is one of the two")
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params is {params!r:.80}; allowed is a SamplingParams")
        return self._runtime.intake.tickets(prompts, params or SamplingParams.from_keywords(**sampling), priority)

    def _prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        return self._runtime.intake.prompts(prompts)

    def _conversations(self, messages: Conversation | Sequence[Conversation]) -> list[list[int]]:
        listed: Any = [messages] if _is_conversation(messages) else messages
        return [self._runtime.tokenizer.chat(conversation) for conversation in listed]


def _start(model: str | Path, config: EngineConfig, progress: Progress | None) -> Runtime | ClusterRuntime:
    if config.cluster is not None:
        from lamina.ray_engine.handle import start_on_cluster

        return start_on_cluster(model, config, progress)
    if config.attention_workers and not share_cores():
        logger.warning(
            "torch was imported before this LLM, so its idle threads spin while attention workers on this host want "
            "the cores; import lamina first, or set GOMP_SPINCOUNT=1000"
        )
    from lamina.launch.builder import start  # it imports torch, which reads the environment

    return start(model, config, progress)


def _is_conversation(messages: object) -> bool:
    """Whether `messages` is one conversation and not a list of them."""
    return not isinstance(messages, Sequence) or not messages or not isinstance(messages[0], list | tuple)
