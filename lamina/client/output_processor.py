"""From an engine's outputs to what callers get: text, events, completions.

There is one `OutputProcessor` for each prompt. It takes outputs in order, on the caller's thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, TypeVar, overload

from lamina.completions import Completion, FinishReason, Sample, Timing, TokenEvent, TokenLogprob, Usage
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.text.stop_strings import StopMatcher
from lamina.text.tokenizer import StreamDecoder, Tokenizer
from lamina_workers.decoder.logprobs import PromptScores, RowLogprobs

Entry = TypeVar("Entry", TokenLogprob, TokenLogprob | None)


class OutputProcessor:
    """The `n` samples of one prompt, which grow by outputs. `index` is the prompt's place in its call.

    `stop` is called with a sample's index when a stop string has ended it, so that the engine ends it too.
    """

    def __init__(self, index: int, request: EngineRequest, tokenizer: Tokenizer, stop: Callable[[int], None]) -> None:
        self._index = index
        self._request = request
        self._text = _Spelling(tokenizer)
        self._samples = [_Growing(i, request.params, tokenizer, self._text) for i in range(request.params.n)]
        self._stop = stop
        self._first_token: float | None = None
        self._last: float | None = None
        scored = 0 if request.params.prompt_logprobs is None else len(request.request.prompt)
        self._prompt: list[bytes | None] = [None] * scored  # reports by position
        self.pooled: tuple[float, ...] = ()
        """The sum of the prompt's hidden states, where that was asked for."""

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finish_reason for sample in self._samples)

    def take(self, outputs: Sequence[EngineOutput], spelled: bool = True) -> Iterator[TokenEvent]:
        """The events that outputs give, in order, with log probabilities only where they are to be `spelled`. Raises
        the request's error where it failed."""
        for output in outputs:
            if output.error is not None:
                raise copy(output.error) from output.error.__cause__  # a copy: threads must not share a traceback
            if output.scores is not None:
                self._take_scores(output.scores)
                continue
            sample = self._samples[output.sample]
            if sample.finish_reason is not None:  # a stop string ended it; what was under way is dropped
                continue
            self._last = output.at
            if output.token is None:
                sample.end(output.finish_reason or "abort")
                continue
            if self._first_token is None:
                self._first_token = output.at
            text, stopped = sample.push(output)
            if stopped:
                self._stop(output.sample)
            report = output.logprobs if spelled else None
            logprob = None if report is None else self._text.logprob(output.token, report)
            ended = (sample.finish_reason, logprob, sample.matcher.stop)
            yield TokenEvent(text, output.token, self._index, output.sample, *ended)

    def _take_scores(self, scores: PromptScores) -> None:
        self.pooled = scores.hidden
        after = scores.start + 1  # the position of the first token that they are of
        reports = [_packed(report, rank) for report, rank in zip(scores.logprobs, scores.ranks, strict=True)]
        self._prompt[after : after + len(reports)] = reports

    def completion(self) -> Completion:
        """All samples as they stand. Samples that have not ended count as aborted."""
        request, since = self._request, self._request.submitted
        tokens = sum(len(sample.token_ids) for sample in self._samples)
        return Completion(
            samples=tuple(sample.finished() for sample in self._samples),
            usage=Usage(len(request.request.prompt), tokens, request.cached_tokens),
            timing=Timing(
                queued=(request.scheduled or since) - since,
                first_token=(self._first_token or since) - since,
                total=(self._last or since) - since,
                tokens=tokens,
            ),
            stats={
                "preemptions": request.preemptions,
                "cached_tokens": request.cached_tokens,
                **request.spared.stats(),
                **draft_stats(request.drafted, request.accepted),
            },
            prompt_logprobs=(
                None
                if request.params.prompt_logprobs is None
                else Logprobs(request.request.prompt, self._prompt, self._text)
            ),
        )


def draft_stats(drafted: int, accepted: int) -> dict[str, float]:
    """Drafts of a request that were verified, those that became tokens, and their share; empty without drafts."""
    if not drafted:
        return {}
    return {"draft_tokens": drafted, "accepted_tokens": accepted, "acceptance": accepted / drafted}


class _Growing:
    """One sample under way."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer, text: _Spelling) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.reports: list[bytes] = []
        self.finish_reason: FinishReason | None = None
        self._params = params
        self._text = text
        self._decoder = StreamDecoder(tokenizer, params.skip_special_tokens)
        self.matcher = StopMatcher(tuple(params.stop), params.include_stop_str_in_output)

    def push(self, output: EngineOutput) -> tuple[str, bool]:
        """Add one token. Returns the text that may be shown for it, and whether a stop string ended the sample."""
        token = output.token or 0
        self.token_ids.append(token)
        if output.logprobs is not None:
            self.reports.append(_packed(output.logprobs))
        text = self._decoder.push(token)
        if output.finish_reason is not None:
            text += self._decoder.finish()
        early = len(self.token_ids) < self._params.min_tokens
        visible_text, stopped = (text, False) if early else self.matcher.push(text)
        if output.finish_reason is not None and not stopped:
            visible_text += self.matcher.finish()
        self.finish_reason = "stop" if stopped else output.finish_reason
        self.pieces.append(visible_text)
        return visible_text, stopped

    def end(self, reason: FinishReason) -> None:
        """End without a further token, and show what was held back."""
        self.finish_reason = reason
        self.pieces.append(self.matcher.push(self._decoder.finish())[0] + self.matcher.finish())

    def finished(self) -> Sample:
        if self.finish_reason is None:
            self.end("abort")
        tokens, self.pieces = tuple(self.token_ids), ["".join(self.pieces)]
        return Sample(
            index=self.index,
            text=self.pieces[0],
            token_ids=tokens,
            finish_reason=self.finish_reason or "abort",
            logprobs=Logprobs(tokens[: len(self.reports)], self.reports, self._text)
            if self._params.logprobs is not None
            else None,
            stop_string=self.matcher.stop,
        )


class Logprobs(Sequence[Entry]):
    """What was reported of tokens; None for a prompt's first, which follows no token. Entries are made where they are
    read: there are many, each with the likeliest tokens, and as objects they take ten times as much."""

    def __init__(self, tokens: Sequence[int], reports: Sequence[bytes | None], spelling: _Spelling) -> None:
        self._tokens = tokens
        self._reports = reports
        self._spelling = spelling

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Entry]: ...
    def __getitem__(self, at: int | slice) -> Entry | Sequence[Entry]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        token, report = self._tokens[at], self._reports[at if at >= 0 else at + len(self)]
        entry: Any = None if report is None else self._spelling.logprob(token, *_unpacked(report))
        return entry  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as other sequences that are compared by their items

    def __repr__(self) -> str:
        return repr(tuple(self))


def _packed(report: RowLogprobs, rank: int = 0) -> bytes:
    """A report in 12 bytes a number, where objects take 100."""
    ids, values = [token for token, _ in report.top], [value for _, value in report.top]
    return struct.pack(f"{len(ids) + 1}d{len(ids) + 1}i", report.chosen, *values, rank, *ids)


def _unpacked(report: bytes) -> tuple[RowLogprobs, int]:
    count = len(report) // 12
    numbers = struct.unpack(f"{count}d{count}i", report)
    top = zip(numbers[count + 1 :], numbers[1:count], strict=True)
    return RowLogprobs(numbers[0], tuple(top)), numbers[count]


class _Spelling:
    """Writes reports with the texts of tokens, each of which is decoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def logprob(self, token: int, row: RowLogprobs, rank: int = 0) -> TokenLogprob:
        top = tuple(TokenLogprob(i, self._text(i), value) for i, value in row.top)
        return TokenLogprob(token, self._text(token), row.chosen, top, rank)

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return text
