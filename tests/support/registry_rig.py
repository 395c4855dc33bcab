"""A registry of requests over a real scheduler; the test plays the model and the clients."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from scheduler_world import OneHolder, config

from lamina.engine.masks import Masks
from lamina.engine.request_registry import Outputs, RequestRegistry
from lamina.errors import InvalidRequest
from lamina.kv.kv_shares import Pages
from lamina.kv.request import Plan, Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.scheduling.scheduler import Scheduler
from lamina_workers.decoder.logprobs import RowLogprobs
from lamina_workers.decoder.sampler import Sampled

PROMPT = (1, 2, 3)


class Notes:
    """A recorder that only notes what it gets, into the log that the clients write too."""

    def __init__(self, log: list[tuple[str, Any]]) -> None:
        self._log = log

    def begun(self, request: EngineRequest, known: Any) -> None:
        self._log.append(("begun", request.request.id))

    def missing(self, request: EngineRequest) -> list[EngineOutput]:
        self._log.append(("missing", request.request.id))
        return [EngineOutput(0, 7)]

    def batch(self, plan: Plan, outputs: Any) -> None:
        self._log.append(("batch", sorted(outputs)))

    def ended(self, sequences: Any, reason: str) -> None:
        self._log.append((reason, [sequence.sample for sequence in sequences]))

    def failed(self, request: EngineRequest) -> None:
        self._log.append(("failed", request.request.id))

    def close(self) -> None:
        self._log.append(("closed", None))


class Rig:
    """A registry over a real scheduler; the test plays the model and the clients."""

    def __init__(self, recorded: bool = False, patience: float = 60.0) -> None:
        self.mail: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.log: list[tuple[str, Any]] = []
        self.got: dict[str, list[EngineOutput]] = {}
        self.scheduler = Scheduler(config(), OneHolder(64))
        self.now = 0.0
        recorder = cast(Any, Notes(self.log)) if recorded else None
        masks = Masks(self.mail.put, patience)
        self.registry = RequestRegistry(self.scheduler, lambda: self.now, masks, None, recorder)

    def submit(
        self, name: str = "a", n: int = 1, tokens: int = 3, prompt: Sequence[int] = PROMPT, **more: Any
    ) -> EngineRequest:
        params = SamplingParams(max_tokens=tokens, n=n, **more).with_defaults({})
        made = EngineRequest(Request(name, tuple(prompt), tokens, n=n), params, 0, self.deliver)
        self.registry.add(made)
        return made

    def deliver(self, request: EngineRequest, outputs: list[EngineOutput]) -> None:
        self.log.append(("client", request.request.id))
        self.got.setdefault(request.request.id, []).extend(outputs)

    def plan(self) -> Plan:
        """The next batch, accepted by the holder."""
        plan = self.scheduler.plan()
        assert plan is not None
        self.scheduler.accepted(plan, Pages({(0, 0): 60}), [0] * len(plan.rows))
        return plan

    def step(self, token: int = 7, plan: Plan | None = None) -> Outputs:
        """One batch, in which every row that samples gives `token`."""
        plan = plan or self.plan()
        rows = sum(row.sample for row in plan.rows)
        step = SimpleNamespace(plan=plan, recorded=partial(self.scheduler.record, plan))
        sampled = Sampled([token] * rows, [RowLogprobs(-1.0, ())] * rows)
        outputs = self.registry.record(cast(Any, step), sampled, self.now)
        self.registry.publish(plan, outputs)
        return outputs

    def tokens(self, name: str = "a", sample: int = 0) -> list[int]:
        return [o.token for o in self.got.get(name, []) if o.token is not None and o.sample == sample]

    def reasons(self, name: str = "a") -> list[str]:
        return [output.finish_reason for output in self.got.get(name, []) if output.finish_reason]

    def errors(self, name: str = "a") -> list[str]:
        return [str(output.error) for output in self.got.get(name, []) if output.error]

    def check_empty(self) -> None:
        """Nothing is left of any request."""
        assert not self.registry.requests
        assert not self.registry.histories
        assert not self.registry.constraints
        assert not self.scheduler.has_work


class Choice:
    """A constraint that allows one text: these tokens, in order. Its masks take until `gate` is open."""

    slow, spent = False, 0.0

    def __init__(self, *text: int) -> None:
        self._left = list(text)
        self.gate = threading.Event()
        self.gate.set()

    @property
    def finished(self) -> bool:
        return not self._left

    def advance(self, *tokens: int) -> None:
        assert self.gate.wait(60)
        for token in tokens:
            if self._left.pop(0) != token:
                raise InvalidRequest(f"token {token} is not allowed")


def constrained(rig: Rig, name: str, *constraints: Choice, received: Any = None, tokens: int = 9) -> EngineRequest:
    n = len(constraints)
    made = EngineRequest(Request(name, PROMPT, tokens, n=n), SamplingParams().with_defaults({}), 0, rig.deliver)
    made.constraints, made.received = cast(Any, constraints), received
    rig.registry.add(made)
    return made
