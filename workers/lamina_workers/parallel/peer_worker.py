"""A model worker beyond 0 (`PeerWorker`): obeys the commands of model worker 0 over a channel.

It computes with a decoder, ports, and pools of KV of its own (`LoadedParts`). One thread loads and computes everything.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel, Credentials
from lamina_protocols.channels.versions import FEATURES, HEARTBEAT, PREVIOUS, PREVIOUS_RELEASE, PROTOCOL_VERSION, shared
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.messages.routes import HolderBatch
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.checkpoints.weight_loader import Packing
from lamina_workers.converted.models import decoder_of, for_ranks, load_model, model_config
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.shard import WHOLE, Collective, Shard
from lamina_workers.devices import available as devices
from lamina_workers.errors import HolderFault, HolderLost, ModelFileError, RankLost, faults
from lamina_workers.model_worker.interface import Waiting
from lamina_workers.model_worker.layer_slices import Context, SlicedBatch, Waits, likeliest
from lamina_workers.model_worker.model_worker import ModelWorker, prepare_kernels
from lamina_workers.parallel import collectives, peer_messages
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.port import AttentionPort, LocalAttention, survey
from lamina_workers.ports.remote import THIS_PROCESS, Edges, RemoteAttention, SeatOptions, connect


class LoadedParts:
    """What a model worker computes with: the decoder and its holders, loaded from `folder` as `begin` says. `progress`
    gets how far that is. Raises LaminaError."""

    def __init__(
        self, begin: peer_messages.Begin, folder: str | Path, progress: Callable[[str, int, int], None]
    ) -> None:
        path = Path(folder)
        if (actual := fingerprint(path)) != begin.model:
            raise ModelFileError(
                f"the model in {path} has fingerprint {actual:.16}, model worker 0's {begin.model:.16}"
            )
        model = model_config(path)
        if begin.rope_scaling:
            model = model.with_rope_scaling(json.loads(begin.rope_scaling))
        self._begin = begin
        self._config = for_ranks(model, begin.ranks)
        self._shard = Shard(begin.rank, begin.ranks) if begin.ranks > 1 else WHOLE
        self._decoder: Decoder | None = None
        self.device = devices.find("device", begin.device)
        dtype: torch.dtype = getattr(torch, begin.dtype)
        torch.set_num_threads(begin.threads)
        self._attention_device = devices.find("attention_device", begin.attention_device, prefer_gpu=False)
        prepare_kernels(begin.holder, dtype, (self.device, self._attention_device), progress)
        with open_checkpoint(path) as checkpoint, torch.inference_mode():
            self._weights = load_model(
                self._config,
                checkpoint,
                dtype,
                self.device,
                lambda *done: progress("loading", *done),
                self._shard,
                Packing(begin.packed, begin.quantize),
            )

    def pool(self, join: peer_messages.Join) -> LocalAttention:
        """A port to a new pool in this process."""
        holder = self._begin.holder
        holder = replace(holder, kv_memory=holder.kv_memory * join.part // max(1, join.of))
        return LocalAttention(attention_worker(holder, self._begin.threads, self._attention_device))

    def worker(self, group: Collective | None, ports: Mapping[int, AttentionPort], epoch: int) -> ModelWorker:
        """The worker, one of `group` where it is one of several ranks."""
        begin = self._begin
        with torch.inference_mode():
            self._decoder = decoder_of(self._config, self._weights, self._shard, group)
        return ModelWorker(self._decoder, begin.holder, ports, begin.threads, begin.patience, epoch=epoch)

    def enter_group(self, group: Collective) -> None:
        if self._decoder is not None:
            self._decoder.collective = group

    def leave_group(self) -> None:
        """It wakes the ranks that wait for this one."""
        if self._decoder is not None and self._decoder.collective is not None:
            self._decoder.collective.close()


_BEAT_S = 1.0  # between two heartbeats, at most
_Run = Generator[Waiting, None, None]


class PeerWorker:
    """Serves one channel until it closes or `Stop` comes.

    `name` is the one that model worker 0 expects. `folder` has the model's files, where it is not the one that `Begin`
    names; `address` is this host's, at which the other ranks reach it. `protocol` is the version of model worker 0.
    `load` gives what computes, `edges` are those of its ports, `beats` connects for heartbeats; None: there are none.
    """

    def __init__(
        self,
        channel: Channel,
        name: str,
        folder: str | Path | None = None,
        address: str = "127.0.0.1",
        protocol: int = PROTOCOL_VERSION,
        *,
        load: Callable[..., LoadedParts] = LoadedParts,
        edges: Edges = THIS_PROCESS,
        waits: Waits | None = None,
        beats: Callable[[], Channel] | None = None,
    ) -> None:
        self._channel = channel
        self._name = name
        self._folder = folder
        self._address = address
        self._protocol = protocol
        self._runs: dict[int, tuple[_Run, Waiting | None]] = {}  # batches under way, and what each waits for
        self._load = load
        self._edges = edges
        self._waits = waits or Waits()
        self._beats = beats
        self._over = edges.runtime.signal()
        # With the rows without logits, and the ports to its holders, which may be others by its next slice.
        self._started: dict[int, tuple[SlicedBatch, tuple[int, ...], dict[int, AttentionPort]]] = {}
        self._batches: dict[int, tuple[int, Mapping[int, HolderBatch]]] = {}  # announced: own number, shares

    def serve(self) -> None:
        """Raises ChannelClosed where model worker 0 was lost, LaminaError where the model cannot be loaded; model
        worker 0 has then got `Failed`."""
        self._send(self._hello())
        begin = self._receive()
        if not isinstance(begin, peer_messages.Begin):
            raise ProtocolError(f"expected Begin, got {type(begin).__name__}")
        try:
            parts = self._load(begin, self._folder or begin.folder, self._report)
        except LaminaError as error:
            self._send(peer_messages.Failed(type(error).__name__, str(error)))
            raise
        self._begin, self._parts, self._epoch = begin, parts, begin.epoch
        self._worker: ModelWorker | None = None  # a rank's decoder needs its group first
        self._ports: dict[int, AttentionPort] = {}
        if begin.ranks == 1:
            self._worker = parts.worker(None, self._ports, begin.epoch)
        self._send(peer_messages.Ready(str(parts.device)))
        if self._beats is not None and HEARTBEAT in begin.features:
            self._edges.runtime.start(partial(self._beat, self._beats, begin.lost_after), "lamina-heartbeat")
        stopped = False
        try:
            while True:
                if self._runs and not self._channel.ready():
                    self._go_on(self._channel)
                    continue
                command = self._receive()
                if stopped := isinstance(command, peer_messages.Stop):
                    return
                self._obey(command)
        finally:
            self._over.set()
            for port in self._ports.values():
                if isinstance(port, RemoteAttention):
                    port.close(keeps=not stopped)  # the next engine looks for the KV of one that died
                else:
                    port.close()
            for port in self._ports.values():
                if isinstance(port, RemoteAttention):
                    port.parted()  # the process ends, and the thread that says goodbye with it

    def _beat(self, connected: Callable[[], Channel], lost_after: float) -> None:
        """Send heartbeats until it is over, or model worker 0 is gone: then whatever waits for that one is woken."""
        try:
            beats = connected()
            try:
                while not self._over.wait(min(lost_after / 4, _BEAT_S)):
                    peer_messages.send(beats, peer_messages.Beat(), lost_after)
            finally:
                beats.close()
        except LaminaError:
            self._channel.close()

    def _hello(self) -> peer_messages.Hello:
        """The first message, as model worker 0 understands it."""
        if self._protocol == PREVIOUS:
            return peer_messages.Hello(self._name, PREVIOUS, PREVIOUS_RELEASE)
        return peer_messages.Hello(self._name, PROTOCOL_VERSION, control.package_version(), tuple(sorted(FEATURES)))

    def _receive(self) -> peer_messages.Command | peer_messages.Report:
        return peer_messages.receive(self._channel)

    def _send(self, report: peer_messages.Report) -> None:
        peer_messages.send(self._channel, report)

    def _report(self, what: str, done: int, total: int) -> None:
        self._send(peer_messages.Progress(what, done, total))

    def _obey(self, command: peer_messages.Command | peer_messages.Report) -> None:
        match command:
            case peer_messages.Announce():
                self._start(command.batch, self._announce(command))
            case peer_messages.Execute():
                self._start(command.batch, self._execute(command))
            case peer_messages.StartBatch(batch):
                entered = self._standing.enter(peer_messages.work_of(command), batch, command.shares, command.suspends)
                ports = {number: self._ports[number] for number in command.shares}
                self._started[batch] = entered, command.plain, ports
            case peer_messages.Slice(batch):
                self._start(batch, self._slice(command))
            case peer_messages.Drop(batch):
                if batch in self._batches:
                    self._standing.forget(*self._batches.pop(batch))
                self._leave_batch(batch)
                if batch in self._runs:  # a copy that was given up
                    self._runs.pop(batch)[0].close()
            case peer_messages.BeginEpoch(epoch):
                for run, _ in self._runs.values():
                    run.close()
                self._runs.clear()
                self._batches.clear()
                for batch in list(self._started):
                    self._leave_batch(batch)
                self._epoch = epoch
                if self._worker is not None:
                    self._worker.next_epoch(epoch)
            case peer_messages.Join():
                self._join(command)
            case peer_messages.Leave(number):
                self._leave(number)
            case peer_messages.Copy():
                self._start(command.batch, self._copy(command))
            case peer_messages.SurveySeat(number):
                self._survey(number)
            case peer_messages.LeaveGroup():
                while self._runs:  # the next command may be there: it has to wait
                    self._go_on()
                self._parts.leave_group()
                self._send(peer_messages.LeftGroup())
            case peer_messages.JoinGroup():
                self._join_group(command)
            case _:
                raise ProtocolError(f"{type(command).__name__} is not a command that a model worker expects now")

    @property
    def _standing(self) -> ModelWorker:
        if self._worker is None:
            raise ProtocolError("a rank got work before it has met the others")
        return self._worker

    # Batches. A run does all of one command and answers by itself.

    def _start(self, batch: int, run: _Run) -> None:
        self._runs[batch] = run, None
        self._advance(batch)

    def _go_on(self, *beside: Channel) -> None:
        """Go on with a batch whose reply has come; where none has, wait for one, or for a message over a channel
        `beside`. Where nothing comes in time, the batch that has waited longest goes on, and finds what is wrong."""
        over = (batch for batch, (_, waiting) in self._runs.items() if waiting is None or waiting.over())
        batch = next(over, None)
        if batch is None:
            waitings = [waiting for _, waiting in self._runs.values() if waiting is not None]
            if self._waits.until_any(waitings, self._begin.patience, beside):
                return
            batch = next(iter(self._runs))
        self._advance(batch)

    def _advance(self, batch: int) -> None:
        run, _ = self._runs.pop(batch)
        with contextlib.suppress(StopIteration):
            self._runs[batch] = run, next(run)

    def _announce(self, command: peer_messages.Announce) -> _Run:
        try:
            with faults():
                number, answers = yield from self._standing.announce(command.shares)
        except HolderFault as fault:
            self._faulted(command.batch, fault)
            return
        if command.runs:
            self._batches[command.batch] = number, command.shares
        self._send(peer_messages.Answers(command.batch, answers))

    def _execute(self, command: peer_messages.Execute) -> _Run:
        work = peer_messages.work_of(command)
        if command.batch not in self._batches:
            raise ProtocolError(f"batch {command.batch} is to be executed, but was not announced")
        number, shares = self._batches.pop(command.batch)
        try:
            with faults():
                yield from self._standing.compute(work, number, shares, False)
        except HolderFault as fault:
            self._parts.leave_group()  # it wakes the ranks that wait for this one's part
            self._faulted(command.batch, fault)

    @torch.inference_mode()
    def _slice(self, command: peer_messages.Slice) -> _Run:
        batch = command.batch
        if batch not in self._started:
            raise ProtocolError(f"a slice of batch {batch} is wanted, which was not entered")
        entered, plain, ports = self._started[batch]
        layers = len(self._begin.holder.layers)
        if command.number > layers:
            raise ProtocolError(f"slice {command.number} is wanted, of {layers + 1}")
        context = Context(command.hidden, command.attended) if command.number else None
        try:
            with faults():
                output = yield from entered.slice(command.number, context, command.last)
        except HolderFault as fault:
            self._leave_batch(batch)
            self._faulted(batch, fault, [number for number, port in ports.items() if port.closed])
            return
        seconds = entered.model_seconds, entered.attention_seconds
        if isinstance(output, Context):
            self._send(peer_messages.Sliced(batch, *seconds, *output))
            return
        self._leave_batch(batch)
        tokens, scores = likeliest(output, plain)
        self._send(peer_messages.Chosen(batch, *seconds, tokens, scores))

    def _leave_batch(self, batch: int) -> None:
        if batch not in self._started:
            return
        entered, *_ = self._started.pop(batch)
        if batch in self._runs:
            run, _ = self._runs.pop(batch)
            run.close()
        entered.close()

    def _copy(self, command: peer_messages.Copy) -> _Run:
        try:
            with faults():
                room = yield from self._standing.copy(command.moves, command.shares)
        except HolderFault as fault:
            self._faulted(command.batch, fault)
            return
        self._send(peer_messages.Copied(command.batch, room))

    def _faulted(self, batch: int, fault: HolderFault, gone: Sequence[int] = ()) -> None:
        """`gone`: holders whose ports in this batch have closed, and may have been replaced."""
        lost = tuple(dict.fromkeys((*self._standing.lost(), *gone)))
        self._send(peer_messages.BatchFailed(batch, str(fault)[:4096], lost, isinstance(fault, RankLost)))

    # Holders.

    def _join(self, join: peer_messages.Join) -> None:
        try:
            port = self._connect(join)
        except LaminaError as error:
            self._send(peer_messages.Failed(type(error).__name__, str(error)))
            return
        self._ports[join.number] = port
        if self._worker is not None:
            self._worker.join(join.number, port)
        features = tuple(sorted(port.features & shared(self._begin.features)))
        if isinstance(port, RemoteAttention):
            self._send(peer_messages.Joined(join.number, port.capacity, port.resumed, features))
        else:
            self._send(peer_messages.Joined(join.number, self._begin.holder.kv_memory, False, features))

    def _connect(self, join: peer_messages.Join) -> AttentionPort:
        if not join.address:
            return self._parts.pool(join)
        begin = self._begin
        port = connect(
            join.address,
            join.name,
            begin.holder,
            begin.dtype,
            begin.model,
            SeatOptions(begin.engine, join.seat, (join.part, join.of), begin.linger),
            ChannelOptions(
                credentials=Credentials(join.ca, join.cert, join.key, join.token),
                local_channel=begin.local_channel,
                data_channel=begin.data_channel,
                lost_after=begin.lost_after,
            ),
            self._edges,
        )
        if join.seat == 0 and not port.resumed:
            port.close()
            raise HolderLost(f"model worker 0 has no place at attention worker {join.name}, at {join.address}")
        return port

    def _leave(self, number: int) -> None:
        port = self._ports.pop(number, None)
        if port is None:
            return
        if self._worker is not None:
            self._worker.leave(number)
        else:
            port.close()

    def _survey(self, number: int) -> None:
        port = self._ports.get(number)
        try:
            if port is None:
                raise HolderFault(f"there is no attention worker {number}")
            self._send(peer_messages.SeatSurveyed(number, survey(port, self._begin.patience, self._epoch - 1)))
        except HolderFault as fault:
            self._send(peer_messages.Failed(type(fault).__name__, str(fault)))

    # The other ranks.

    def _join_group(self, command: peer_messages.JoinGroup) -> None:
        self._parts.leave_group()
        meeting = collectives.Meeting(command.generation, command.path, command.host, command.port, self._address)
        begin = self._begin
        try:
            group = collectives.join(begin.rank, begin.ranks, meeting, command.timeout, self._parts.device)
        except RankLost as error:
            self._send(peer_messages.JoinedGroup(command.generation, str(error)))
            return
        if self._worker is None:
            self._worker = self._parts.worker(group, self._ports, self._epoch)
        else:
            self._parts.enter_group(group)
        self._send(peer_messages.JoinedGroup(command.generation, ""))
