"""`LLM`: a model, its workers and its engine, for Python programs.

It may be used from several threads and event loops at once.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from lamina.client.call import Call
from lamina.client.input_processor import Conversations, Prepared, Prompts
from lamina.completions import Completion, TokenEvent
from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.errors import EngineError, InvalidRequest
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
    `EngineConfig`. `progress(what, done, total)` is called as downloads, conversion and loading go on. Raises
    ModelFileError or UnsupportedModelError for the model, InvalidRequest for the rest.

    `generate` and `chat` give one `Completion` for one prompt or conversation and a list for a list. `stream` and
    `stream_chat` give `TokenEvent`s as they come; closing the iterator ends the requests. `agenerate`, `achat`,
    `astream` and `astream_chat` are the same for event loops. Each takes a `SamplingParams` or its fields as keywords,
    and `priority` (lower is more urgent).
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, *, progress: Progress | None = None, **config: Any) -> None:
        known = EngineConfig.__dataclass_fields__
        for name in config:
            if name not in known:
                raise InvalidRequest(f"unknown keyword {name!r} for LLM; known are {', '.join(known)}")
        runtime = _start_runtime(model, EngineConfig(**config), progress)
        self._loaded: Runtime | ClusterRuntime | None = runtime
        self._resumed = False
        self._stop = weakref.finalize(self, runtime.stop)  # once: by close(), by the collector, or when Python ends

    @classmethod
    def from_plan(
        cls, path: str | Path, *, model: str | Path | None = None, progress: Progress | None = None, **overrides: Any
    ) -> LLM:
        """One replica of the engine that a plan file (`lamina plan --out`) describes. `model` and fields of
        `EngineConfig` override the plan's. Raises InvalidRequest where the file is wrong or no engine can do what it
        plans, and what `LLM(...)` raises."""
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
        """Whether `chat` can be used: the model has a chat template."""
        return self._runtime.tokenizer.has_chat_template

    @property
    def max_model_len(self) -> int:
        """The most tokens that one prompt and its output can have."""
        return self._runtime.inputs.max_model_len

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
        self, prompts: Prompts, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> Completion | list[Completion]: ...
    def generate(
        self, prompts: Prompts, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> Completion | list[Completion]:
        """Complete prompts: text or lists of token ids. Ctrl-C raises Interrupted, with what was finished."""
        return self._start(self._runtime.inputs.prompts(prompts), params, priority, sampling).result()

    def chat(
        self, messages: Conversations, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> Completion | list[Completion]:
        """Answer a conversation, a list of {"role": ..., "content": ...}, or each of a list of conversations."""
        return self._start(self._runtime.inputs.conversations(messages), params, priority, sampling).result()

    def stream(
        self, prompts: Prompts, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> Iterator[TokenEvent]:
        """Like `generate`, token by token. Bad arguments raise here, not at the first token."""
        return iter(self._start(self._runtime.inputs.prompts(prompts), params, priority, sampling))

    def stream_chat(
        self, messages: Conversations, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> Iterator[TokenEvent]:
        """Like `chat`, token by token."""
        return iter(self._start(self._runtime.inputs.conversations(messages), params, priority, sampling))

    async def agenerate(
        self, prompts: Prompts, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> Completion | list[Completion]:
        """`generate` for event loops."""
        return await self._start(self._runtime.inputs.prompts(prompts), params, priority, sampling)

    async def achat(
        self, messages: Conversations, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> Completion | list[Completion]:
        """`chat` for event loops."""
        return await self._start(self._runtime.inputs.conversations(messages), params, priority, sampling)

    def astream(
        self, prompts: Prompts, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> AsyncIterator[TokenEvent]:
        """`stream` for event loops."""
        return aiter(self._start(self._runtime.inputs.prompts(prompts), params, priority, sampling))

    def astream_chat(
        self, messages: Conversations, params: SamplingParams | None = None, *, priority: int = 0, **sampling: Any
    ) -> AsyncIterator[TokenEvent]:
        """`stream_chat` for event loops."""
        return aiter(self._start(self._runtime.inputs.conversations(messages), params, priority, sampling))

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
        again = [replace(request, received=(((), False),) * request.params.n) for request in unfinished]
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

    # From arguments to a call.

    @property
    def _runtime(self) -> Runtime | ClusterRuntime:
        runtime = self._loaded  # once: another thread may close this LLM
        if runtime is None:
            raise EngineError("this LLM is closed")
        return runtime

    def _start(
        self, prepared: Prepared, params: SamplingParams | None, priority: int, sampling: Mapping[str, Any]
    ) -> Call:
        """A call whose requests are checked. It submits them once it is waited for or iterated."""
        if params is not None and sampling:
            raise InvalidRequest(f"both params and {', '.join(sampling)} were given; allowed is one of the two")
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params is {params!r:.80}; allowed is a SamplingParams")
        params = params or SamplingParams.from_keywords(**sampling)
        inputs = self._runtime.inputs
        requests = inputs.requests(prepared.prompts, params, priority)
        inputs.compile(params)
        return Call(self._runtime, requests, prepared.one, owner=self)


def _start_runtime(model: str | Path, config: EngineConfig, progress: Progress | None) -> Runtime | ClusterRuntime:
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
