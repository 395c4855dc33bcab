"""`LLM`: a model, its workers and its engine, for Python programs.

It may be used from several threads and event loops at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from lamina.client.call import Call, EmbeddingCall
from lamina.client.input_processor import Conversation, Conversations, Prepared, Prompts
from lamina.completions import Completion, Embedding, TokenEvent
from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.errors import EngineError, InvalidRequest
from lamina.messages.engine_request import Received
from lamina.sampling_params import SamplingKeywords, SamplingParams, chosen_params
from lamina.system.child_process import SPAWN, check_process
from lamina.system.progress import Progress, StderrBars, watched
from lamina_workers.devices.openmp import share_cores

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lamina.config import EngineKeywords
    from lamina.launch.builder import Runtime
    from lamina.ray_cluster.handle import ClusterRuntime
    from lamina.text.tokenizer import Tokenizer

logger = logging.getLogger("lamina")

_reached_in: int | None = None  # the process that made an LLM with workers in other processes


class RequestKeywords(SamplingKeywords, total=False):
    """The keywords of `generate` and `stream`."""

    priority: int


class ChatKeywords(RequestKeywords, total=False):
    """The keywords of `chat` and `stream_chat`."""

    chat_template_kwargs: Mapping[str, Any] | None


class LLM:
    """A loaded model. Use it in `with` or `async with`, or `close` it.

    `model` is an alias (`lamina models ls`), a folder, a GGUF file or a hub id; the keywords are the fields of
    `lamina.EngineConfig`. `progress(what, done, total)` is called as downloads, conversion, compiling and loading go
    on; None draws bars on stderr where that is a terminal or a notebook, False is silent. An LLM belongs to the process
    that made it: after a fork the child makes its own. Raises ModelFileError or UnsupportedModelError for the model,
    InvalidRequest for the rest.

    `generate` and `chat` give one `Completion` for one prompt or conversation and a list for a list. `stream` and
    `stream_chat` give `TokenEvent`s as they come; closing the iterator ends the requests. `agenerate`, `achat`,
    `astream` and `astream_chat` are the same for event loops. Each takes a `SamplingParams` or its fields as keywords,
    and `priority` (lower is more urgent).
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        progress: Progress | Literal[False] | None = None,
        **config: Unpack[EngineKeywords],
    ) -> None:
        options = EngineConfig.__dataclass_fields__
        for name in config:
            if name not in options:
                near = get_close_matches(name, options, n=2)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(options)}"
                raise InvalidRequest(f"unknown keyword {name!r} for LLM: {hint}")
        self._name, self._process = str(model), os.getpid()
        bars = StderrBars() if progress is None and watched() else None
        try:
            runtime = _start_runtime(model, EngineConfig(**config), progress or bars)
        finally:
            if bars is not None:
                bars.close()
        self._loaded: Runtime | ClusterRuntime | None = runtime
        self._resumed = False
        stop = partial(_stop, runtime, self._process)
        self._stop = weakref.finalize(self, stop)  # once: by close(), by the collector, or when Python ends

    @classmethod
    def from_plan(
        cls,
        path: str | Path,
        *,
        model: str | Path | None = None,
        progress: Progress | Literal[False] | None = None,
        **overrides: Unpack[EngineKeywords],
    ) -> LLM:
        """One replica of the engine that a plan file (`lamina plan --out`) describes. `model` and fields of
        `EngineConfig` override the plan's. Raises InvalidRequest where the file is wrong or no engine can do what it
        plans, and what `LLM(...)` raises."""
        from lamina.plan_file import read

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
        """Whether `chat` can be used: the model has a chat template."""
        return self._runtime.tokenizer.has_chat_template

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer: `encode` a text, `decode` token ids, `chat` for the ids of a conversation."""
        return self._runtime.tokenizer

    @property
    def max_model_len(self) -> int:
        """The most tokens that one prompt and its output can have."""
        return self._runtime.inputs.max_model_len

    @property
    def alive(self) -> bool:
        """Whether it can take requests: not closed, its engine runs, and this is the process that made it."""
        return self._loaded is not None and self._process == os.getpid() and self._loaded.engine.alive

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = None, **request: Unpack[RequestKeywords]
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: SamplingParams | None = None,
        **request: Unpack[RequestKeywords],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompts: Prompts, params: SamplingParams | None = None, **request: Unpack[RequestKeywords]
    ) -> Completion | list[Completion]: ...
    def generate(
        self, prompts: Prompts, params: SamplingParams | None = None, **request: Unpack[RequestKeywords]
    ) -> Completion | list[Completion]:
        """Complete prompts: text or lists of token ids. Ctrl-C raises Interrupted, with what was finished."""
        return self._complete(prompts, params, request).result()

    @overload
    def chat(
        self, messages: Conversation, params: SamplingParams | None = None, **request: Unpack[ChatKeywords]
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Conversation], params: SamplingParams | None = None, **request: Unpack[ChatKeywords]
    ) -> list[Completion]: ...
    @overload
    def chat(
        self, messages: Conversations, params: SamplingParams | None = None, **request: Unpack[ChatKeywords]
    ) -> Completion | list[Completion]: ...
    def chat(
        self, messages: Conversations, params: SamplingParams | None = None, **request: Unpack[ChatKeywords]
    ) -> Completion | list[Completion]:
        """Answer a conversation, a list of {"role": ..., "content": ...}, or each of a list of conversations.
        `chat_template_kwargs` are variables of the model's template, such as {"enable_thinking": False}."""
        return self._answer(messages, params, request).result()

    def stream(
        self, prompts: Prompts, params: SamplingParams | None = None, **request: Unpack[RequestKeywords]
    ) -> Iterator[TokenEvent]:
        """Like `generate`, token by token. Bad arguments raise here, not at the first token."""
        return iter(self._complete(prompts, params, request))

    def stream_chat(
        self, messages: Conversations, params: SamplingParams | None = None, **request: Unpack[ChatKeywords]
    ) -> Iterator[TokenEvent]:
        """Like `chat`, token by token."""
        return iter(self._answer(messages, params, request))

    async def agenerate(
        self, prompts: Prompts, params: SamplingParams | None = None, **request: Unpack[RequestKeywords]
    ) -> Completion | list[Completion]:
        """`generate` for event loops."""
        return await self._complete(prompts, params, request)

    async def achat(
        self, messages: Conversations, params: SamplingParams | None = None, **request: Unpack[ChatKeywords]
    ) -> Completion | list[Completion]:
        """`chat` for event loops."""
        return await self._answer(messages, params, request)

    def astream(
        self, prompts: Prompts, params: SamplingParams | None = None, **request: Unpack[RequestKeywords]
    ) -> AsyncIterator[TokenEvent]:
        """`stream` for event loops."""
        return aiter(self._complete(prompts, params, request))

    def astream_chat(
        self, messages: Conversations, params: SamplingParams | None = None, **request: Unpack[ChatKeywords]
    ) -> AsyncIterator[TokenEvent]:
        """`stream_chat` for event loops."""
        return aiter(self._answer(messages, params, request))

    def embed(
        self,
        inputs: Prompts,
        *,
        pooling: str = "last",
        dimensions: int | None = None,
        normalize: bool = True,
        priority: int = 0,
    ) -> Embedding | list[Embedding]:
        """Embed inputs: text or lists of token ids. One `Embedding` for one input, a list for a list.

        `pooling` says of which hidden states it is made: "last", that of the last token; "mean", of all; "eos", that of
        the model's end-of-text token, which is appended where it is missing. `dimensions` keeps the first ones. With
        `normalize` the length is 1. What a model wants before an input, such as an instruction, is the caller's to
        write. Raises InvalidRequest for arguments, and for models whose code is not native.
        """
        return self._embed(inputs, pooling, dimensions, normalize, priority).result()

    async def aembed(
        self,
        inputs: Prompts,
        *,
        pooling: str = "last",
        dimensions: int | None = None,
        normalize: bool = True,
        priority: int = 0,
    ) -> Embedding | list[Embedding]:
        """`embed` for event loops."""
        return await self._embed(inputs, pooling, dimensions, normalize, priority)

    def _embed(
        self, inputs: Prompts, pooling: str, dimensions: int | None, normalize: bool, priority: int
    ) -> EmbeddingCall:
        runtime = self._runtime
        return EmbeddingCall(runtime, runtime.inputs, inputs, pooling, dimensions, normalize, priority, owner=self)

    @property
    def unfinished(self) -> int:
        """How many requests `resume` would complete: the previous engine with the same `journal` left them."""
        return len(self._runtime.unfinished) if not self._resumed else 0

    def resume(self) -> list[Completion]:
        """Complete the requests that the previous engine with the same `journal` left unfinished when its process died.

        The completions are in the order of the requests and whole, with the tokens from before. The second time the
        list is empty.
        """
        unfinished = self._runtime.unfinished if not self._resumed else ()
        self._resumed = True
        again = [replace(request, received=(Received(),) * request.params.n) for request in unfinished]
        call = Call(self._runtime, again)
        call.result()
        return call.completions()

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

    async def __aenter__(self) -> LLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        state = "closed" if self._loaded is None else "running" if self.alive else "not running"
        context = f", context of {self.max_model_len} tokens" if state == "running" else ""
        return f"<LLM {self._name!r}: {state}{context}>"

    def check_process(self) -> None:
        """Raise EngineError in a process that was forked from the one that made this LLM: its threads are not here."""
        check_process(self._process, "this LLM")

    # From arguments to a call.

    @property
    def _runtime(self) -> Runtime | ClusterRuntime:
        self.check_process()
        runtime = self._loaded  # once: another thread may close this LLM
        if runtime is None:
            raise EngineError("this LLM is closed")
        return runtime

    def _complete(self, prompts: Prompts, params: SamplingParams | None, request: RequestKeywords) -> Call:
        return self._start(self._runtime.inputs.prompts(prompts), params, request)

    def _answer(self, messages: Conversations, params: SamplingParams | None, request: ChatKeywords) -> Call:
        template_kwargs = request.pop("chat_template_kwargs", None)
        return self._start(self._runtime.inputs.conversations(messages, template_kwargs), params, request)

    def _start(self, prepared: Prepared, params: SamplingParams | None, request: RequestKeywords) -> Call:
        """A call whose requests are checked. It submits them once it is waited for or iterated."""
        priority = request.pop("priority", 0)
        params = chosen_params(params, request)
        inputs = self._runtime.inputs
        requests = inputs.requests(prepared.prompts, params, priority)
        inputs.compile(params)
        return Call(self._runtime, requests, prepared.one, owner=self)


def _stop(runtime: Runtime | ClusterRuntime, process: int) -> None:
    """Stop the engine, but not in a forked child, which has none of its threads."""
    if process == os.getpid():
        runtime.stop()


def _start_runtime(model: str | Path, config: EngineConfig, progress: Progress | None) -> Runtime | ClusterRuntime:
    if config.cluster is not None or config.attention_workers or config.autoscale:
        _reach_workers()
    if config.cluster is not None:
        from lamina.ray_cluster.handle import start_on_cluster

        return start_on_cluster(model, config, progress)
    if (config.attention_workers or config.autoscale) and not share_cores():
        logger.warning(
            "torch was loaded before, by this program or by an LLM without attention workers, so its idle threads spin "
            "while attention workers on this host want the cores; set GOMP_SPINCOUNT=1000 before Python starts"
        )
    from lamina.launch.builder import start  # it imports torch, which reads the environment

    return start(model, config, progress)


def _reach_workers() -> None:
    """Raise EngineError in a process that was forked from one that reached workers elsewhere."""
    global _reached_in
    process = os.getpid()
    if _reached_in not in (None, process):
        raise EngineError(
            f"process {_reached_in} had an LLM with attention_workers or on a cluster before this one, {process}, was "
            f"forked from it, and gRPC does not work after that; use {SPAWN}, or an LLM without them"
        )
    _reached_in = process
