"""Shared by the tests: a tiny random model, in memory and as a folder."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis.internal.conjecture import engine as hypothesis_engine

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where Triton is imported, and some test may import it first

if not __debug__:  # python -O drops asserts, some of which act, except in files that pytest rewrites
    pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "support").glob("*.py")))

from engine_rig import DEVICE
from tiny_decoders import decoder_of

from lamina_workers.attention_worker.page_layout import attention_kernels
from lamina_workers.decoder.model import Decoder

# No test measures time. The same code has the same drawn cases for everybody: a red run is the change's. The soak set
# draws fresh ones (`scripts/test --all` sets LAMINA_DRAW), and prints what repeats a failure.
settings.register_profile("lamina", deadline=None, derandomize=True)
settings.register_profile("soak", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("soak" if os.environ.get("LAMINA_DRAW") == "fresh" else "lamina")
# A failing case is made small within a test's time limit, or the run would end without any case.
pytest.MonkeyPatch().setattr(hypothesis_engine, "MAX_SHRINKING_SECONDS", 20)


@pytest.fixture(scope="session")
def device() -> str:
    """Where a test computes: `DEVICE`."""
    return DEVICE


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the kernels of the tiny model if they never were, before any test's time counts."""
    if session.config.getoption("numprocesses", None):
        return  # the processes that run the tests do it
    for page_size in (16, 32):
        for _ in attention_kernels().prepare(attention_kernels().layout(page_size, 16, 16, torch.float32)):
            pass


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from more, and a busy machine makes teams of threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _inference_mode_is_left() -> Iterator[None]:
    """A test that stays in torch's inference mode fails itself, and not some later test whose engine has a thread."""
    yield
    assert not torch.is_inference_mode_enabled()


@pytest.fixture(autouse=True)
def _logging_is_as_before() -> Iterator[None]:
    """Commands that serve configure the logging of their whole process."""
    root, own = logging.getLogger(), logging.getLogger("lamina")
    handlers, level, own_level = root.handlers[:], root.level, own.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    own.setLevel(own_level)


@pytest.fixture(autouse=True, scope="session")
def _nothing_old_is_collected() -> None:
    """Modules and tests live as long as the run. Each seat of an attention worker that ends has all garbage collected,
    which took 0.6 s where these were looked at too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    """The tiny decoder, full attention in every layer."""
    return decoder_of("full")


@pytest.fixture(scope="session")
def windowed() -> Decoder:
    """A tiny decoder whose middle layer has a sliding window of 21 tokens."""
    return decoder_of("windowed")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder of files."""
    from real_workers import write_tiny_model  # it loads all that talks to workers

    return write_tiny_model(tmp_path_factory.mktemp("model"))
