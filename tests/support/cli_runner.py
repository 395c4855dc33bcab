"""The command line in this process, over a fake LLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.completions import FinishReason, TokenEvent, TokenLogprob
from lamina.sampling_params import SamplingParams


class FakeLLM:
    """Answers with the prompt's words in capitals, one token a word, prompts and samples taking turns."""

    reason: FinishReason = "stop"

    def __init__(
        self, model: str, *, progress: Any, fail_after: tuple[int, BaseException] | None = None, **options: Any
    ):
        self.model = model
        self.options = options
        self.has_chat_template = True
        self.max_model_len = 4096
        self.asked: list[tuple[str, Any, SamplingParams]] = []
        self.closed = False
        self._fail_after = fail_after
        progress("loading", 1, 2)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def stream(self, prompts: list[str], params: SamplingParams) -> Iterator[TokenEvent]:
        self.asked.append(("stream", prompts, params))
        return self._events(prompts, params)

    def stream_chat(self, messages: Any, params: SamplingParams) -> Iterator[TokenEvent]:
        self.asked.append(("stream_chat", messages, params))
        conversations = messages if isinstance(messages[0], list) else [messages]
        return self._events([conversation[-1]["content"] for conversation in conversations], params)

    def _events(self, prompts: list[str], params: SamplingParams) -> Iterator[TokenEvent]:
        answers = [prompt.upper().split() for prompt in prompts]
        sent = 0
        for turn in range(max(map(len, answers))):
            for prompt, words in enumerate(answers):
                for sample in range(params.n if turn < len(words) else 0):
                    if self._fail_after is not None and sent == self._fail_after[0]:
                        raise self._fail_after[1]
                    sent += 1
                    yield TokenEvent(
                        text=" " * (turn > 0) + words[turn],
                        token_id=turn,
                        prompt_index=prompt,
                        sample_index=sample,
                        finish_reason=self.reason if turn == len(words) - 1 else None,
                        logprob=None if params.logprobs is None else TokenLogprob(turn, words[turn], -0.5),
                    )


class Lamina:
    """Runs commands as a shell would, with `FakeLLM` in the place of `LLM`; `llm` is the last one made."""

    def __init__(self) -> None:
        self.llm: FakeLLM | None = None
        self.fail_after: tuple[int, BaseException] | None = None

    def __call__(self, *words: str, stdin: bytes = b"") -> Any:
        return CliRunner().invoke(app, list(words), input=stdin, obj=self._make)

    def _make(self, model: str, **options: Any) -> FakeLLM:
        self.llm = FakeLLM(model, fail_after=self.fail_after, **options)
        return self.llm
