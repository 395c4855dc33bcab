"""Layers handed over between compiled code and Python for as long as one likes, under all that an engine does: nothing
hangs, and the text is that of one process.

`LAMINA_SOAK_SECONDS=600` sets how long it goes on, `LAMINA_SOAK_SEED=n` begins with the choices of that seed. What they
meet depends on the machine too.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import Rig, collect, holder_config
from exchange_peers import Joints, exchanged
from kv_pools import pool_of
from policy_bench import LOOSE, under

from lamina.errors import EngineError
from lamina.kv.placement import Holder
from lamina.sampling_params import SamplingParams
from lamina.scheduling.step_tuner import MeasuredBatch, StepTuner
from lamina_protocols.messages.messages import Announcement, Exchange, Fresh, Query
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import Decoder
from lamina_workers.errors import KVError

SECONDS = float(os.environ.get("LAMINA_SOAK_SECONDS", "20"))
SEED = int(os.environ.get("LAMINA_SOAK_SEED", "1"))
PLACEMENTS: list[dict[str, Any]] = [
    {"shard": "heads", "weights": (1,)},
    {"shard": "heads", "weights": (1, 1)},
    {"shard": "heads", "weights": (2, 1, 1), "local_pool": 500},
    {"shard": "sequence", "weights": (1, 1, 2)},
    {"shard": "heads+sequence", "weights": (1, 1, 1, 1), "local_pool": 200},
]
TRANSPORTS = ("local", "local", "local", "tcp", "tcp", "tcp+sum", "tcp+tls", "grpc")
draw = random.Random(17)
PROMPTS = [[draw.randrange(101) for _ in range(n)] for n in (1, 3, 20, 40, 70, 150, 260)]
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 11}]
TOKENS = 40

logger = logging.getLogger(__name__)


class Restless(StepTuner):
    """A local share that changes every few batches, so that KV moves."""

    def __init__(self, rng: random.Random, lanes: int) -> None:
        super().__init__((lanes,), 0.5)
        self._rng = rng

    def completed(self, batch: MeasuredBatch, moving: bool = False) -> None:
        if self._rng.random() < 0.1:
            self.share = self._rng.choice((0.0, 0.5, 1.0))


@pytest.fixture
def models(decoder: Decoder, windowed: Decoder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Decoder]:
    """Some have heads that choose in each batch, which only Python can do. They choose everything, so text is known."""
    for cost in ("CALL", "BYTE"):
        monkeypatch.setattr(f"lamina_workers.policies.retrieval.{cost}", 0)
    return {
        "full": decoder,
        "windowed": windowed,
        "choosing": under(decoder, LOOSE["retrieval"]),
        "some heads choose": under(decoder, "full", LOOSE["page_top_k"], "full"),
    }


class Known:
    """What one process says."""

    def __init__(self, models: dict[str, Decoder]) -> None:
        self._models = models
        self._said: dict[tuple[Any, ...], list[list[int]]] = {}

    def say(self, model: str, prompt: int, sampling: int, n: int) -> list[list[int]]:
        key = model, prompt, sampling, n
        if key not in self._said:
            rig = Rig(self._models[model])
            (self._said[key],) = rig.generate([PROMPTS[prompt]], max_tokens=TOKENS, n=n, **SAMPLINGS[sampling])
            rig.close()
        return self._said[key]


class Faults:
    """Workers, of whose messages one in many fails while this is `on`, but never several soon after each other: an
    engine gives up a request that fails again and again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.on = True
        self.told = 0
        self._quiet = 0  # messages before another may fail

    def spoil(self, worker: AttentionWorker) -> None:
        handle = worker.handle

        def spoilt(request: Any) -> Any:
            self._quiet -= 1
            fails = self.on and self._quiet < 0 and isinstance(request, (Announcement, Exchange, Fresh, Query))
            if fails and self._rng.random() < 0.05:
                self.told, self._quiet = self.told + 1, 200
                raise KVError("a fault of the soak")
            return handle(request)

        worker.handle = spoilt  # type: ignore[method-assign]


class Round:
    """One engine and its holders, for some prompts."""

    def __init__(self, seed: int, models: dict[str, Decoder], known: Known) -> None:
        self.rng = rng = random.Random(seed)
        self._known = known
        self._model = rng.choice(list(models))
        self._kind = rng.choice(TRANSPORTS)
        self._options = rng.choice(PLACEMENTS) | {
            "lanes": rng.choice((1, 2, 2)),
            "max_batch_tokens": rng.choice((48, 64, 512)),
            "prefix_cache": rng.random() < 0.4,
        }
        if rng.random() < 0.5:
            self._options |= {"local_pool": 1500, "local_tier": True, "tuner": Restless(rng, self._options["lanes"])}
        self.faults = Faults(rng)
        self._faulty = rng.random() < 0.3
        self._models = models

    def __str__(self) -> str:
        return f"{self._model}, {self._kind}, {self._options}, faults: {self._faulty}"

    def run(self) -> None:
        with Joints(self._kind) as joints:
            rig = Rig(self._models[self._model], port=joints, **self._options)
            try:
                if self._faulty:
                    for joined in joints.made:
                        self.faults.spoil(joined.worker)
                self._serve(rig, joints)
            finally:
                self.faults.on = False
                rig.engine.close()
                joints.close()  # what a worker was told last is done now
                rig.close()
                for joined in joints.made:
                    pool_of(joined.worker).store.check_integrity()

    def _serve(self, rig: Rig, joints: Joints) -> None:
        rng, asked = self.rng, []
        for _ in range(rng.randint(4, 9)):
            choice = rng.randrange(len(PROMPTS)), rng.randrange(len(SAMPLINGS)), rng.choice((1, 1, 2, 3))
            prompt, sampling, n = choice
            params = SamplingParams(max_tokens=TOKENS, n=n, **SAMPLINGS[sampling]).with_defaults({"do_sample": True})
            ticket, inbox = rig.submit(PROMPTS[prompt], params)
            if rng.random() < 0.1:
                time.sleep(rng.random() * 0.1)
                rig.engine.abort(ticket)
            else:
                asked.append((choice, inbox))
            if rng.random() < 0.3:
                self._happen(rig, joints)
            time.sleep(rng.random() * 0.05)
        for (prompt, sampling, n), inbox in asked:
            assert collect(inbox, n) == self._known.say(self._model, prompt, sampling, n), str(self)

    def _happen(self, rig: Rig, joints: Joints) -> None:
        """A holder dies, is drained or joins. One at least stays."""
        rng = self.rng
        alive = [joined for joined in joints.made if not joined.port.closed and not joined.leaving]
        what = rng.choice(("kill", "drain", "join"))
        if what != "join" and len(alive) > 1:
            chosen = rng.choice(alive)
            chosen.leaving = True
            if what == "kill":
                chosen.kill()
            else:
                rig.engine.drain(chosen.port.name).add_done_callback(_retrieved)
        elif len(joints.made) < 7:
            worker = AttentionWorker(holder_config(self._models[self._model]))
            rig.engine.join(joints(worker), Holder((rig.pages,), 1, fused=False))


def _retrieved(done: Any) -> None:
    """A drain may find its holder lost, which is no fault here."""
    if done.exception() is not None and not isinstance(done.exception(), EngineError):
        raise done.exception()


@pytest.fixture
def compiled() -> Iterator[None]:
    with exchanged("compiled"):
        yield


@pytest.mark.fault("F29")
@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 300)
def test_text_stays_the_same_however_long_layers_change_hands(models: dict[str, Decoder], compiled: None) -> None:
    known, end, rounds, told = Known(models), time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < end:
        this = Round(SEED + rounds, models, known)
        logger.warning("round %d: %s", SEED + rounds, this)
        this.run()
        rounds, told = rounds + 1, told + this.faults.told
    logger.warning("%d rounds, %d faults", rounds, told)
