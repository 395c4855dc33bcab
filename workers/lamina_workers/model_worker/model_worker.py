"""The dense side of the cut: announces a batch to the holders, runs the decoder over it, samples.

Owns the decoder, the attention merge, the ports to the holders, and the numbering of epochs and batches. A plan comes
as spans of tokens and the routes of their rows. Announcing and executing are generators, suspended while they wait for
a holder. `prepare_kernels` loads the kernels that all this needs before the first batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import torch

from lamina_kernels.compile.launch import load_each
from lamina_kernels.dense import dense
from lamina_kernels.exchange.exchange_loop import exchange_kernel
from lamina_kernels.sketches import sketches
from lamina_kernels.states import advance
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_protocols.messages.messages import Announced, Announcement
from lamina_protocols.messages.pools import pools
from lamina_protocols.messages.routes import HolderBatch, Route
from lamina_workers.attention_worker.page_layout import attention_kernels, page_layout
from lamina_workers.decoder.logprobs import PromptScores
from lamina_workers.decoder.model import Batch, Decoder, Forward
from lamina_workers.decoder.prompt_scores import PromptScorer
from lamina_workers.decoder.sampler import Sampled, sample
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.model_worker.attention_merge import AttentionMerge, Pausing
from lamina_workers.model_worker.holder_traffic import query_goes_first
from lamina_workers.model_worker.interface import BatchWork, Returned, ReturnedPeer, Seat, Waiting, accepts, result
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.model_worker.kv_transfer import KvTransfer
from lamina_workers.model_worker.layer_slices import SlicedBatch
from lamina_workers.model_worker.state_traffic import send_constants
from lamina_workers.ports.direct import enabled
from lamina_workers.ports.port import AttentionPort, Replies, Transported
from lamina_workers.ports.timing import Link, Stopwatch, Times


def prepare_kernels(
    holder: HolderConfig,
    dtype: torch.dtype,
    places: tuple[torch.device, torch.device],
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Load the kernels. The first time on a machine they are compiled, which takes some seconds.

    `places`: where the model is, and where KV is kept; the present is attended where the model is.
    """
    stages: list[tuple[str, Iterable[tuple[int, int]]]] = []
    for pool in pools(holder):
        if pool.config.layers[0].kind in STATES:
            stages.append(("state kernels", advance.prepare()))
            continue
        for where in dict.fromkeys(places):
            layout = page_layout(pool.config, where)
            stages.append(("attention kernels", attention_kernels(where).prepare(layout)))
        if HeadPolicies.of(pool.config).sketched:
            stages.append(("sketch kernels", sketches.prepare(page_layout(pool.config, places[1]))))
    stages.append(("dense kernels", dense.prepare(dtype, places[0])))
    if enabled():
        stages.append(("exchange kernels", load_each((exchange_kernel,))))
    for what, steps in stages:
        for done, total in steps:
            if progress is not None:
                progress(f"preparing {what}", done, total)


class ModelWorker:
    """Runs batches over one decoder. One thread; several batches may be under way, each suspended in turn.

    `patience`: seconds that a holder may take for a reply, above what its work is expected to take. `clock`, in
    seconds, is what time is measured by. It begins in `epoch`.
    """

    missing: tuple[int, ...] = ()

    def __init__(
        self,
        decoder: Decoder,
        holder: HolderConfig,
        ports: Mapping[int, AttentionPort],
        threads: int = 1,
        patience: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
        epoch: int = 1,
    ) -> None:
        self._decoder = decoder
        self._clock = clock
        self._watch = Stopwatch(clock)
        self._constants = decoder.state_constants()
        self._replies: dict[int, Replies] = {}
        self._prepared: dict[AttentionPort, Replies] = {}  # of holders that are about to join
        self._merge = AttentionMerge(holder, threads, patience, self._watch, decoder.device)
        self._holder = holder
        self._patience = patience
        self._epoch = epoch
        self._batch = 0
        self._sampled: dict[int, dict[int, tuple[int, ...]]] = {}  # by batch: the holders' `Announced.samples`
        for number, port in ports.items():
            self._replies[number] = Replies(port, clock)
            with contextlib.suppress(HolderLost):  # then it is among those that are lost
                send_constants(port, epoch, self._constants)

    def join(self, number: int, port: AttentionPort, credentials: Credentials | None = None) -> tuple[Seat, ...]:
        """As `Workers` says; there are no other ranks."""
        send_constants(port, self._epoch, self._constants)
        prepared = self._prepared.pop(port, None)
        self._replies[number] = prepared or Replies(port, self._clock)
        return ()

    def prepare(self, port: AttentionPort) -> None:
        for prepared in list(self._prepared):
            if prepared.closed:  # another rank could not connect to it
                self._prepared.pop(prepared, None)
        self._prepared[port] = Replies(port, self._clock)

    def leave(self, number: int) -> None:
        self._replies.pop(number).port.close()

    def begin_after(self, epoch: int) -> None:
        self._epoch = max(self._epoch, epoch + 1)

    def address(self, number: int) -> str:
        port = self._replies[number].port
        return port.address if isinstance(port, Transported) else ""

    def features(self, number: int) -> frozenset[str]:
        return self._replies[number].port.features

    def returned(self, peer: ReturnedPeer) -> Returned:
        """Never: there are no other ranks."""
        raise RankLost(f"model worker {peer.rank} is not one of this engine")

    @property
    def epoch(self) -> int:
        """The number of the epoch that batches are announced in."""
        return self._epoch

    def next_epoch(self, epoch: int | None = None) -> None:
        """As `Workers` says. `epoch` is the number of the new one, None: the next."""
        self._epoch = self._epoch + 1 if epoch is None else epoch
        self._sampled.clear()

    def announce(
        self, shares: Mapping[int, HolderBatch], computes: bool = True
    ) -> Generator[Waiting, None, tuple[int, dict[int, Announced]]]:
        """As `Workers` says; the batch `computes` its layers."""
        self._batch += 1
        batch = self._batch
        answers: dict[int, Announced] = {}
        faults: dict[int, HolderFault] = {}
        recipients = []
        for number, share in shares.items():
            self._replies[number].expect(self._epoch, batch)
            try:
                announcement = Announcement(self._epoch, batch, share.first, share.operations, share.rows)
                self._replies[number].port.send(announcement)
                recipients.append(number)
            except HolderFault as fault:
                faults[number] = fault
        for number in recipients:  # all answers are read before one is blamed
            try:
                answers[number] = yield from self._answer(number, batch)
                self._check(answers[number], shares[number], self._replies[number])
            except HolderFault as fault:
                faults[number] = fault
            except GeneratorExit:  # given up meanwhile
                self.forget(batch, shares)
                raise
        if faults:
            self.forget(batch, shares)
            worst = max(faults, key=lambda number: isinstance(faults[number], HolderLost))
            raise faults[worst]
        if not any(share.routes for share in shares.values()) or not all(reply.accepted for reply in answers.values()):
            self.forget(batch, shares)
            return batch, answers
        for number, share in shares.items() if computes else ():
            if share.routes:
                self._replies[number].accepted(batch)
        if sampled := {number: reply.samples for number, reply in answers.items() if reply.samples}:
            self._sampled[batch] = sampled
        return batch, answers

    def announce_now(self, shares: Mapping[int, HolderBatch]) -> tuple[int, dict[int, Announced]]:
        return result(self.announce(shares))

    def execute(
        self, work: BatchWork, batch: int, shares: Mapping[int, HolderBatch], suspends: bool = True
    ) -> Generator[Waiting, None, Sampled]:
        """As `Workers` says. Where it `suspends`, there is something else to go on with while it waits."""
        logits, scores = yield from self.compute(work, batch, shares, suspends)
        with torch.inference_mode():
            return sample(logits, work.sampling, scores)

    @torch.inference_mode()
    def compute(
        self, work: BatchWork, batch: int, shares: Mapping[int, HolderBatch], suspends: bool = True
    ) -> Generator[Waiting, None, tuple[torch.Tensor, Sequence[PromptScores]]]:
        """As `execute`, but returns the logits, float32 `[S, vocab]`, and the scores of prompts; a rank beyond 0 has
        none of them."""
        routes = {self._replies[number]: self._routes(batch, number, share) for number, share in shares.items()}
        first = query_goes_first(routes, len(work.spans))
        scorer = None
        if work.scored:
            scorer = PromptScorer(work.scored, self._decoder.config.vocab_size, self._decoder.device)
        try:
            forward = self._decoder.forward(self._to_device(work, scorer), query_first=first)
            logits = yield from self._run(forward, work, batch, routes, suspends, whole=True)
            return logits, () if scorer is None else scorer.scores
        finally:
            self.forget(batch, shares)

    def _routes(self, batch: int, number: int, share: HolderBatch) -> Sequence[Route]:
        """The routes of a holder, with the samples that it wants of them."""
        sampled = self._sampled.get(batch, {}).get(number)
        if sampled is None:
            return share.routes
        return [route._replace(sampled=stride) for route, stride in zip(share.routes, sampled, strict=True)]

    def samples(self, batch: int) -> bool:
        """Whether a holder wants samples of an announced batch: it is then computed where it was announced."""
        return batch in self._sampled

    def enter(
        self, work: BatchWork, batch: int, shares: Mapping[int, HolderBatch], suspends: bool = True
    ) -> SlicedBatch:
        """Take part in a batch of this epoch that every holder has accepted, whichever worker has announced it: its
        slices are computed one at a time."""
        routes = {self._replies[number]: share.routes for number, share in shares.items()}
        return SlicedBatch(
            self._decoder,
            self._to_device(work),
            query_goes_first(routes, len(work.spans)),
            lambda forward: self._in_slices(forward, work, batch, shares, routes, suspends),
            self._watch,
            self._clock,
        )

    @torch.inference_mode()
    def _in_slices(
        self,
        forward: Pausing,
        work: BatchWork,
        batch: int,
        shares: Mapping[int, HolderBatch],
        routes: Mapping[Replies, Sequence[Route]],
        suspends: bool,
    ) -> Generator[Waiting, None, torch.Tensor]:
        for replies in routes:
            replies.expect(self._epoch, batch)
        try:
            return (yield from self._run(forward, work, batch, routes, suspends))
        finally:
            self.forget(batch, shares)

    def _run(
        self,
        forward: Forward | Pausing,
        work: BatchWork,
        batch: int,
        routes: Mapping[Replies, Sequence[Route]],
        suspends: bool,
        whole: bool = False,
    ) -> Generator[Waiting, None, torch.Tensor]:
        logits = yield from self._merge.run(forward, self._epoch, batch, work.spans, routes, suspends, whole)
        for replies, routed in routes.items():
            if any(route.row.read is not None for route in routed):
                replies.computed()
        return logits

    def copy(
        self, moves: Sequence[Move], shares: Mapping[int, HolderBatch], accepted: Callable[[], None] = accepts
    ) -> Generator[Waiting, None, bool]:
        """Copy KV between holders. `shares` open the parts and announce the rows that store it, in this order at each
        target; together the moves fill all heads of each of these rows. Only of pages that are XORed a holder may be
        both origin and target. Returns whether every target had room; where one has not, nothing counts as done.
        `accepted` is called once all have taken what they need.

        It is suspended until holders answer, and batches may run meanwhile. Closed before its end it leaves the rows of
        the targets torn; nothing may be under way of it when the next epoch begins.

        Whole pages go as they lie where they begin alike and all these holders lay them out alike; so do states, which
        are of one position: a move of them is of [0, that position)."""
        batch, answers = yield from self.announce(shares, computes=False)
        sampling = {
            (number, route.row.handle): route
            for number, share in shares.items()
            for route in self._routes(batch, number, share)
            if route.sampled
        }
        if not all(reply.accepted for reply in answers.values()):
            return False
        accepted()
        origins = {move.origin for move in moves}
        for number in origins:
            self._replies[number].expect(self._epoch, batch)
        transfer = KvTransfer(self._holder, self._replies, self._patience, (self._epoch, batch))
        try:
            yield from transfer.run(moves, {*origins, *shares}, sampling)
        finally:
            self.forget(batch, shares)
            for number in origins & self._replies.keys():
                self._replies[number].forget(batch)
        return True

    @property
    def times(self) -> Times:
        return self._merge.times

    @property
    def attention_seconds(self) -> float:
        """As `Workers` says; the time in which a batch was suspended is not its own."""
        return self._watch.seconds

    @property
    def experts_read(self) -> tuple[int, int]:
        return self._decoder.experts_read

    def links(self) -> dict[int, Link]:
        return {number: replies.link() for number, replies in self._replies.items()}

    def lost(self) -> list[int]:
        return [number for number, replies in self._replies.items() if replies.port.closed]

    def _answer(self, number: int, batch: int) -> Generator[Waiting, None, Announced]:
        replies = self._replies[number]
        if not replies.ready(batch):
            yield Waiting(replies, batch)
        self._watch.start()
        try:
            return replies.take(Announced, batch, timeout=self._patience)
        finally:
            self._watch.stop()

    @staticmethod
    def _check(answer: Announced, share: HolderBatch, replies: Replies) -> None:
        counts = (len(answer.floors), len(answer.usages) or len(share.routes))
        if answer.accepted and counts != (len(share.routes), len(share.routes)):
            raise replies.unfit(f"floors and usages of {counts} rows, {len(share.routes)} were announced")
        rows = [route.row for route in share.routes]
        if answer.samples and (
            len(answer.samples) != len(rows)
            or any(row.read is not None or not row.prompt for row, n in zip(rows, answer.samples, strict=True) if n)
        ):
            raise replies.unfit(f"samples of {answer.samples} were asked of rows that bring queries, or of no prompt")
        starts = [route.row.start for route in share.routes] if answer.starts else []
        bounded = [min(max(0, bound), start) for bound, start in zip(answer.starts, starts, strict=False)]
        if len(starts) != len(answer.starts) or bounded != list(answer.starts):
            raise replies.unfit(f"rows that start at {starts} can start at {answer.starts} at most")

    def forget(self, batch: int, shares: Mapping[int, HolderBatch]) -> None:
        """A batch that was announced will not be executed."""
        self._sampled.pop(batch, None)
        for number in shares:
            if number in self._replies:
                self._replies[number].forget(batch)

    def _to_device(self, work: BatchWork, scorer: PromptScorer | None = None) -> Batch:
        device = self._decoder.device
        positions = [p for span in work.spans for p in range(span.start, span.start + span.count)]
        rope_lengths = None
        if self._decoder.config.rope.by_length:
            prompts = [length for span, length in zip(work.spans, work.prompts, strict=True) for _ in range(span.count)]
            rope_lengths = torch.tensor([max(n, p + 1) for n, p in zip(prompts, positions, strict=True)], device=device)
        return Batch(
            token_ids=torch.tensor(work.token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            sampled=torch.tensor(work.sampled, dtype=torch.int64, device=device),
            rope_lengths=rope_lengths,
            scorer=scorer,
            hidden=work.hidden,
        )
