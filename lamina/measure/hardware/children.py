"""What the measuring processes run: `python -m lamina.measure.hardware.children KIND OPTIONS`.

Answers each line [what, {arguments}] on stdin with a line on stdout, until stdin closes. All of torch runs on the main
thread, but for an engine's, which has a thread of its own. torch is imported only after the environment that OpenMP
reads is set: `exchange` shares its cores with attention workers, as an engine with such workers does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from lamina.errors import LaminaError

Answers = Mapping[str, Callable[..., Any]]


def reading(size: int) -> Answers:
    """Reading `size` bytes of memory, without any model."""
    import torch

    from lamina.measure.hardware.reading import Bandwidth
    from lamina.system.machine import this_machine

    threads = this_machine().cores
    torch.set_num_threads(threads)
    bandwidth = Bandwidth(size, torch.device("cpu"), threads)
    return {"read": bandwidth.settled}


def kernels(**options: Any) -> Answers:
    """Reading memory, dense layers, attention: with the settings of an engine that is alone."""
    from lamina.measure.hardware.kernel_bench import KernelBench

    bench = KernelBench(**options)
    return {name: getattr(bench, name) for name in ("about", "read", "peak", "dense", "attention", "layers")}


def exchange(**options: Any) -> Answers:
    """A layer's exchange with attention workers, and bare messages to one."""
    from lamina_workers.devices.openmp import share_cores

    share_cores()
    from lamina.measure.hardware.exchange_bench import ExchangeBench

    bench = ExchangeBench(**options)
    return {name: getattr(bench, name) for name in ("layers", "messages", "close")}


def engine(**options: Any) -> Answers:
    """Decode steps of an engine; options are those of `LLM`."""
    from dataclasses import asdict

    from lamina.llm import LLM
    from lamina.measure.hardware.decode_steps import measure

    llm = LLM(prefix_cache=False, **options)
    return {"step": lambda **cell: asdict(measure(llm, **cell)), "close": llm.close}


KINDS: Mapping[str, Callable[..., Answers]] = {kind.__name__: kind for kind in (reading, kernels, exchange, engine)}


def serve(make: Callable[[], Answers], lines: Iterable[str], out: TextIO) -> None:
    """Make the object that answers, report that it is ready, and answer line by line; close it at the end. An error is
    an answer too."""

    def say(**answer: Any) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        answers = make()
    except LaminaError as error:
        return say(error=f"{type(error).__name__}: {error}")
    say(result=None)
    for line in lines:
        what, arguments = json.loads(line)
        try:
            result = answers[what](**arguments)
        except LaminaError as error:
            say(error=f"{type(error).__name__}: {error}")
        else:
            say(result=result)
    if (close := answers.get("close")) is not None:
        close()
    return None


if __name__ == "__main__":
    answers_out, sys.stdout = sys.stdout, sys.stderr  # whatever is printed on the way is no answer
    serve(lambda: KINDS[sys.argv[1]](**json.loads(sys.argv[2])), sys.stdin, answers_out)
    answers_out.flush()
    os._exit(0)  # do not wait for threads that are still idle
