"""Calibration as a whole: a model's name and a target in, a policy file and its evidence out.

Everything happens on the caller's thread, as torch wants it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.launch.kv_sizing import holder_config
from lamina.measure.calibration.capture import TorchPath
from lamina.measure.calibration.data import TAIL, Corpus, corpus, passkeys
from lamina.measure.calibration.evidence import NEEDLES, WORDS, Evidence, Subject, Wanted, gather
from lamina.measure.calibration.quality import Quality, Reading, Target, compare, read
from lamina.measure.calibration.scores import Trial, choose
from lamina.measure.calibration.windows import candidates, options_at
from lamina.measure.probe import Probe, loaded
from lamina.policy_file import Heads, PolicyFile, kept_share
from lamina.system.machine import this_machine
from lamina.system.progress import Progress
from lamina.text.tokenizer import Tokenizer
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.converted.config import ConvertedConfig
from lamina_workers.decoder.model import Decoder
from lamina_workers.errors import UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.policies.streaming import Streaming

DEFAULT_CONTEXT = 8192  # tokens, where the model's own is longer
DEFAULT_STEPS = 200
LEAST_CONTEXT = 2048
_READ = 1024  # tokens of plain text that quality is measured on


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to calibrate. `context` None: the model's, up to 8192; `sink` first tokens are in every window; `recent` and
    `steps` are of the gates; `text` None: Python's help. Raises InvalidRequest for `steps`, PolicyError for sizes.

    `scores` is a file that keeps the evidence: it is read if it is there, else written.
    """

    target: Target = field(default_factory=lambda: Target(0.99))
    context: int | None = None
    sink: int = 64
    recent: int = 256
    steps: int = DEFAULT_STEPS
    text: Path | None = None
    seed: int = 0
    scores: Path | None = None

    def __post_init__(self) -> None:
        if type(self.steps) is not int or not 1 <= self.steps <= 100_000:
            raise InvalidRequest(f"steps is {self.steps!r:.80}; allowed are 1 to 100000")
        _ = self.request(LEAST_CONTEXT)

    def request(self, context: int) -> Wanted:
        """The evidence that is needed at a context."""
        gates = Streaming(self.sink, self.recent)
        return Wanted(context, options_at(context, self.sink), gates, self.steps, self.seed)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result. `chosen` None: only the full cache was good enough, and `file` is full everywhere."""

    file: PolicyFile
    evidence: Evidence
    trials: tuple[Trial, ...]
    chosen: Trial | None
    context: int


class Workbench:
    """A loaded model whose policies can be changed, and the texts it is judged by."""

    def __init__(self, path: Path, model: ModelConfig, decoder: Decoder, tokenizer: Tokenizer, engine: EngineConfig):
        self.path = path
        self.model = model
        self.tokenizer = tokenizer
        self._decoder = decoder
        self._threads = engine.threads or this_machine().cores
        self._holder = holder_config(path, model, replace(engine, policy=None), decoder.dtype, this_machine())

    @classmethod
    @contextmanager
    def open(cls, name: str | Path, engine: EngineConfig) -> Iterator[Workbench]:
        """The model of that name, as `LLM(name, ...)` would load it."""
        with loaded(name, engine) as (path, model, decoder, tokenizer):
            if isinstance(model, ConvertedConfig):
                raise UnsupportedModelError(f"{model.architecture} is converted; only native models are calibrated")
            yield cls(path, model, decoder, tokenizer, engine)

    def probe(self, context: int, heads: Heads | None = None) -> Probe:
        """The model under these policies (None: everything is kept), with room for one sequence of `context`."""
        layers = self._holder.layers
        if heads is not None:
            layers = tuple(replace(spec, policies=texts) for spec, texts in zip(layers, heads, strict=True))
        holder = replace(self._holder, layers=layers)
        cells = self.model.num_hidden_layers * self.model.num_key_value_heads
        pages = cells * (-(-context // holder.page_size) + 1)
        return Probe(self.model, self._decoder, replace(holder, kv_memory=pages * page_cost(holder)), self._threads)

    def context(self, asked: int | None) -> int:
        """The length to calibrate for. Raises InvalidRequest where the model has no such context."""
        limit = self.model.max_position_embeddings
        context = min(limit, DEFAULT_CONTEXT) if asked is None else asked
        if not LEAST_CONTEXT <= context <= limit:
            raise InvalidRequest(f"context is {context}; allowed are {LEAST_CONTEXT} to {limit}, the model's own")
        return context

    def judge(
        self, texts: Corpus, context: int, seed: int, in_decode: bool, progress: Progress
    ) -> Callable[[Heads], Quality]:
        """A function that measures policies on `context` tokens of the held-out text, beside the full cache, which
        is measured when it is first called."""
        count = min(_READ, context // 4)
        length = context - count - TAIL
        hidden = passkeys(self.tokenizer, texts.held_out, length, NEEDLES, WORDS, random.Random(seed + 1))
        text = texts.held_out[length : length + count]
        full_readings: list[Reading] = []

        def reading(heads: Heads | None, what: str) -> Reading:
            report = partial(progress, f"{what}, {context} tokens")
            return read(self.probe(context, heads), hidden, text, report, in_decode)

        def judged(heads: Heads) -> Quality:
            if not full_readings:
                full_readings.append(reading(None, "full cache"))
            return compare(context, reading(heads, "policies"), full_readings[0])

        return judged


def calibrate(
    name: str | Path, settings: Settings, engine: EngineConfig, progress: Progress = lambda what, done, total: None
) -> Calibration:
    """Find which policy each KV head of a model can do with. Raises InvalidRequest, PolicyError, ModelFileError, and
    UnsupportedModelError for attention that is not plain.

    `engine` gives the model's dtype, its threads and the scaling of its RoPE.
    """
    with Workbench.open(name, engine) as bench:
        context = bench.context(settings.context)
        request = settings.request(context)
        texts = corpus(bench.tokenizer, settings.text, context)
        mark = fingerprint(bench.path)
        evidence = _evidence(bench, texts, request, settings.scores, mark, progress)
        every = candidates(request.policies, evidence, context)
        measure = bench.judge(texts, context, settings.seed, False, progress)
        chosen, trials = choose(every, measure, settings.target, partial(progress, "selection"))
        heads = every[-1] if chosen is None else chosen.heads
        about: dict[str, str | int | float | bool] = {
            "method": "windows",
            "target_quality": settings.target.quality,
            "context": context,
            "kv_kept": round(kept_share(heads, context), 4),
        }
        if chosen is not None:
            quality = chosen.quality
            about |= {
                "measured_kv_held": round(quality.held, 4),
                "measured_nll_change": round(quality.nll_change, 5),
                "measured_agreement": round(quality.agreement, 4),
                "measured_passkeys": f"{quality.passkeys} of {quality.words}, full cache {quality.passkeys_full}",
            }
        file = PolicyFile(str(name), mark, heads, about)
        return Calibration(file, evidence, tuple(trials), chosen, context)


def measure(
    name: str | Path,
    file: PolicyFile,
    engine: EngineConfig,
    context: int | None = None,
    text: Path | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Quality:
    """What a policy file costs on the held-out half of a text, at `context` tokens, read in decode steps after the
    prompt. Raises as `calibrate` does."""
    with Workbench.open(name, engine) as bench:
        file.check(bench.model, fingerprint(bench.path))
        length = bench.context(context)
        texts = corpus(bench.tokenizer, text, length)
        return bench.judge(texts, length, seed, True, progress)(file.heads)


def _evidence(
    bench: Workbench, texts: Corpus, request: Wanted, scores: Path | None, mark: str, progress: Progress
) -> Evidence:
    marks = request.marks(mark, texts)
    if scores is not None and scores.exists():
        return Evidence.load(scores, marks)
    with open_checkpoint(bench.path) as checkpoint:
        path = TorchPath(bench.model, checkpoint)
    subject = Subject(bench.probe(request.length), path, bench.tokenizer, texts)
    evidence = gather(subject, request, progress)
    if scores is not None:
        evidence.save(scores, marks)
    return evidence
