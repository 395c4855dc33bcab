"""One batch, from the control plane's step to the outputs that its clients get: announce, compute, record, publish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.engine.holders import Holders
from lamina.engine.observers import BatchDone, BatchObserver, EngineStats, savings
from lamina.engine.request_registry import Outputs, RequestRegistry
from lamina.engine.tiering import TierController
from lamina.errors import EngineError
from lamina.kv.request import Plan, PlannedRow, ScheduledSequence
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.scheduling.control_plane import ControlPlane, Step, refusal, torn
from lamina_protocols.messages.messages import Announced
from lamina_protocols.messages.routes import Span
from lamina_workers.decoder.logprobs import PromptTokens
from lamina_workers.decoder.sampler import RowSampling, Sampled, TokenCounts, TokenHistory
from lamina_workers.errors import faults
from lamina_workers.model_worker.interface import BatchWork, Waiting, Workers

if TYPE_CHECKING:
    import torch

    from lamina.text.structured_output import Constraint
    from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")


@dataclass(frozen=True, slots=True)
class BatchParts:
    """The parts of an engine that its batches go through. `clock`: seconds. `hears`: hidden states are wanted."""

    worker: Workers[Peer]
    control: ControlPlane
    registry: RequestRegistry
    holders: Holders
    tiering: TierController
    stats: EngineStats
    observers: tuple[BatchObserver, ...]
    clock: Callable[[], float]
    hears: bool = False


class Batch:
    """A batch under way. `run` goes through its phases, and is suspended on `waiting`.

    Any error while it is announced and computed is a HolderFault. Any other ends the engine: its books would be half
    written.
    """

    def __init__(self, parts: BatchParts, step: Step) -> None:
        registry = parts.registry
        self.step = step
        self.waiting: Waiting | None = None
        self.run = self._run()
        self._parts = parts
        # Looked up now, since requests may end while the batch is under way.
        self._requests = {row.sequence: registry.requests[row.sequence.request.id] for row in step.rows}
        self._histories = {s: history for s in self._requests if (history := registry.histories.get(s)) is not None}
        self._since = 0.0
        self._hidden: list[torch.Tensor] | None = [] if parts.hears else None

    def _run(self) -> Generator[Waiting, None, None]:
        self._since = self._parts.clock()
        number, plan = (yield from self.announce()), self.step.plan
        if number is not None and plan is not None:
            sampled = yield from self.compute(plan, number)
            self.publish(plan, self.record(plan, sampled))

    def announce(self) -> Generator[Waiting, None, int | None]:
        """Announce it to the holders concerned. Returns its number at the model worker; None where nothing is to be
        computed: a holder refuses, or there are operations alone."""
        parts, step = self._parts, self.step
        parts.registry.begins(step.rows)
        with faults():
            number, answers = yield from parts.worker.announce(step.batches)
        agreed = self._agreed(answers)
        parts.stats.announce_seconds += parts.clock() - self._since
        return number if agreed and step.rows else None

    def _agreed(self, answers: Mapping[int, Announced]) -> bool:
        """Whether every holder accepts. Where one refuses, the scheduler has made room for its next plan."""
        parts, step = self._parts, self.step
        if guilty := step.at_fault(answers):
            raise parts.holders.contradicted(guilty)
        if (why := refusal(answers)) is not None and step.plan is not None:
            if torn(answers):
                logger.warning("a batch runs again: %s", why)
            else:
                short = {number for number, answer in answers.items() if not answer.accepted}
                parts.tiering.abandon(short)  # moves take pages that others need
            for sequence in step.refused(answers):
                parts.registry.forget(sequence)
                if request := parts.registry.of(sequence):
                    parts.registry.fail(request, EngineError(f"there is no room for its KV: {why}"))
            return False
        step.accepted(answers)
        for request_id, spared in savings(step, answers).items():
            if request := parts.registry.requests.get(request_id):
                parts.stats.spared(request.spared, spared)
                request.spared = spared
        return True

    def compute(self, plan: Plan, number: int) -> Generator[Waiting, None, Sampled]:
        """Have the model worker compute the batch that every holder has accepted."""
        parts = self._parts
        parts.registry.scheduled(self._requests)
        with faults():
            work = batch_work(plan.rows, self._requests, self._histories, parts.registry.constraints, self._hidden)
            lanes = parts.control.tuner.lanes
            return (yield from parts.worker.execute(work, number, self.step.batches, lanes > 1))

    def record(self, plan: Plan, sampled: Sampled) -> Outputs:
        """It is computed: note its tokens and its time in all books."""
        parts, now = self._parts, self._parts.clock()
        scheduler = parts.control.scheduler
        running = len(scheduler.running)
        scheduler.fair_share.took(sum(row.count for row in plan.rows), now - self._since)
        local, remote = parts.control.tokens_read(plan)
        outputs = parts.registry.record(self.step, sampled, now)
        parts.stats.corrupted += outputs.corrupted
        done = BatchDone(
            plan=plan,
            outputs=outputs.by_request,
            prompt_tokens=outputs.prompt_tokens,
            sampled=outputs.sampled,
            running=running,
            local_tokens=local,
            remote_tokens=remote,
            times=parts.worker.times,
            attended=parts.worker.attention_seconds,
            now=now,
            hidden=self._hidden,
        )
        for observer in parts.observers:
            observer.batch_done(done)
        return outputs

    def publish(self, plan: Plan, outputs: Outputs) -> None:
        """Write it to the journal, then send its outputs to the clients."""
        self._parts.registry.publish(plan, outputs)


def batch_work(
    rows: Sequence[PlannedRow],
    requests: Mapping[ScheduledSequence, EngineRequest],
    histories: Mapping[ScheduledSequence, TokenHistory],
    constraints: Mapping[ScheduledSequence, Constraint],
    hidden: list[torch.Tensor] | None = None,
) -> BatchWork:
    """What the model worker computes for these rows: tokens, positions, and how each row samples. `requests` has every
    row's sequence, `histories` the sequences with penalties, `constraints` those with constrained text; these have
    foreseen what may come after their drafts. `hidden`: see `BatchWork`."""
    token_ids: list[int] = []
    scored: list[PromptTokens] = []
    sampled: list[int] = []
    sampling: list[RowSampling] = []
    for row in rows:
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
    spans = tuple(Span(row.start, row.count, row.sequence.request.policy) for row in rows)
    prompts = tuple(len(row.sequence.request.prompt) for row in rows)
    return BatchWork(spans, prompts, token_ids, tuple(sampled), tuple(sampling), tuple(scored), hidden)


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
