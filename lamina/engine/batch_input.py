"""From a plan to what the model worker computes: tokens, positions, and how each row samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lamina.kv.request import Plan, PlannedRow, ScheduledSequence
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina_protocols.messages.routes import Span
from lamina_workers.decoder.logprobs import PromptTokens
from lamina_workers.decoder.sampler import RowSampling, TokenCounts, TokenHistory
from lamina_workers.model_worker.interface import BatchWork

if TYPE_CHECKING:
    from lamina.text.structured_output import Constraint


def batch_work(
    plan: Plan,
    requests: Mapping[ScheduledSequence, EngineRequest],
    histories: Mapping[ScheduledSequence, TokenHistory],
    constraints: Mapping[ScheduledSequence, Constraint],
) -> BatchWork:
    """The tokens of a plan's rows. `requests` has every row's sequence, `histories` the sequences with penalties,
    `constraints` those with constrained text; these have foreseen what may come after their drafts."""
    token_ids: list[int] = []
    scored: list[PromptTokens] = []
    sampled: list[int] = []
    sampling: list[RowSampling] = []
    for row in plan.rows:
        sequence = row.sequence
        if row.scored:
            scored.append(_scored(row, requests[sequence].params, len(token_ids)))
        token_ids += sequence.tokens[row.start : row.start + row.known]
        if row.sample:
            sampled += range(len(token_ids) - 1, len(token_ids) + len(row.drafts))
            history, constraint = histories.get(sequence), constraints.get(sequence)
            for drafts in range(row.samples):
                counts = history if history is None or not drafts else history.ahead(row.drafts[:drafts])
                sampling.append(_sampling(sequence, requests[sequence], counts, constraint, drafts))
        token_ids += row.drafts
    spans = tuple(Span(row.start, row.count, row.sequence.request.policy) for row in plan.rows)
    prompts = tuple(len(row.sequence.request.prompt) for row in plan.rows)
    return BatchWork(spans, prompts, token_ids, tuple(sampled), tuple(sampling), tuple(scored))


def _scored(row: PlannedRow, params: SamplingParams, first: int) -> PromptTokens:
    """What a row of which the `first` token of the batch is the first has scored."""
    start, stop = row.scored.start, row.scored.stop
    request, first = row.sequence.request, first + start - row.start
    if request.pooled:
        return PromptTokens(first, start, stop - start)
    return PromptTokens(first, start, stop - start, request.prompt[start + 1 : stop + 1], params.prompt_logprobs or 0)


def _sampling(
    sequence: ScheduledSequence,
    request: EngineRequest,
    history: TokenHistory | TokenCounts | None,
    constraint: Constraint | None,
    drafts: int,
) -> RowSampling:
    """How the token is sampled that follows so many drafts: as if they had been generated."""
    params = request.params
    position = len(sequence.tokens) - len(request.request.prompt) + drafts
    suppressed = tuple(request.request.stop_token_ids) if position < params.min_tokens else ()
    if constraint is not None:  # it has precedence over the other limits
        suppressed = constraint.impossible(suppressed, params.ignore_eos, drafts)
    return RowSampling(
        temperature=params.temperature or 0.0,
        top_p=params.top_p or 1.0,
        top_k=max(0, params.top_k or 0),
        min_p=params.min_p or 0.0,
        repetition_penalty=params.repetition_penalty or 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        history=history,
        logit_bias=params.logit_bias,
        suppressed=suppressed,
        allowed=None if constraint is None else constraint.after(drafts),
        seed=request.seed,
        sample_index=sequence.sample,
        position=position,
        logprobs=params.logprobs,
    )
