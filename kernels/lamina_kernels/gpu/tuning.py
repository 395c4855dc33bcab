"""What the Triton kernels are launched with: tile sizes, warps and pipeline stages by GPU, and how a launch is made."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from lamina_kernels.paged.pages import PageLayout

FEW_ROWS = 16  # query vectors of the smallest tile that tensor cores multiply (mma.m16n8k16, PTX ISA)

# Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when Triton's own were defined, and when ours.
INTERPRETED = not isinstance(tl.cdiv, triton.JITFunction)

_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` query vectors by `keys` keys, for a program of `warps` that loads `stages` steps of its loop ahead."""

    rows: int
    keys: int
    warps: int
    stages: int

    def bytes(self, width_k: int, width_v: int, itemsize: int) -> int:
        """Shared memory that it may take: queries, weights, and K and V of every stage. width_v: 0 where V is in K."""
        queries_and_weights = self.rows * (width_k + self.keys)
        return itemsize * (queries_and_weights + self.stages * self.keys * (width_k + width_v))


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is chosen for one family of devices."""

    few: Tile  # for pieces of at most FEW_ROWS query vectors: what decoding asks
    many: Tile  # for larger ones: chunks of prompts
    many_wide: Tile  # the same for heads of more than 128 channels
    programs: int  # at once on one multiprocessor
    shared: int  # bytes of shared memory that one program may take

    def tile(self, layout: PageLayout, rows: int) -> Tile:
        """The tile for pieces of up to `rows` vectors, made smaller until it fits into shared memory."""
        width_k, width_v = padded(layout.d_k), padded(layout.d_v)
        if layout.latent:  # V, and what of K is behind it, are loaded once
            width_k, width_v = width_v + padded(layout.d_k - layout.d_v), 0
        wide = max(width_k, width_v) > 128
        tile = self.few if rows <= FEW_ROWS else self.many_wide if wide else self.many
        tile = dataclasses.replace(tile, rows=min(tile.rows, max(FEW_ROWS, int(triton.next_power_of_2(rows)))))
        itemsize = max(2, layout.dtype.itemsize)  # codes are widened to bfloat16
        while tile.bytes(width_k, width_v, itemsize) > self.shared and (tile.keys > 16 or tile.rows > 16):
            if tile.keys > 32 or tile.rows == 16:
                tile = dataclasses.replace(tile, keys=tile.keys // 2)
            else:
                tile = dataclasses.replace(tile, rows=tile.rows // 2)
        return tile


# None of this has been run on a GPU; what is not said to be published is an estimate, unmeasured.
# few: vLLM and SGLang launch their grouped decode kernel (`_decode_grouped_att_m_fwd`) with 16 heads, 32 keys, 4 warps
# and 2 stages on every NVIDIA GPU. Hopper's 3 stages are an estimate: it reads memory about twice as fast as Ampere.
# many: rows and keys are those of FlashAttention-2 for causal attention with heads of 128 and, wide, of 256
# (`flash_fwd_launch_template.h`, which takes the same for compute capability 8.6 as for 8.9), but for Ampere's wide
# ones, and Ada's keys there. It has 4 warps for most of them; compiled from Triton with 4, tiles of 128 rows do not
# fit into registers (ptxas: a stack of 512 bytes for bfloat16 heads of 128 on 9.0), with 8 they do. 2 stages and the
# wide tiles of Ampere and Ada are estimates.
# programs: FlashAttention-2 (`flash_api.cpp`) counts two blocks of 128 threads on a multiprocessor.
# shared: "maximum amount of shared memory per thread block", CUDA C Programming Guide, compute capabilities.
AMPERE = Tuning(Tile(16, 32, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), 2, 163 << 10)
ADA = Tuning(Tile(16, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), 2, 99 << 10)
HOPPER = Tuning(Tile(16, 32, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), 2, 227 << 10)
# In the interpreter a step takes about as long whatever its size, and a program is one thread's work.
INTERPRETER = Tuning(Tile(16, 64, 1, 1), Tile(128, 64, 1, 1), Tile(64, 64, 1, 1), 1, 1 << 30)

_DOTS = {torch.float32: tl.float32, torch.float16: tl.float16}  # all others, quantised codes among them: bfloat16


def padded(width: int) -> int:
    """The width of a tile of `width` channels: Triton's tiles are powers of two, of at least 16 in a product."""
    return max(16, int(triton.next_power_of_2(width)))


def tuning_for(device: torch.device) -> Tuning:
    """The numbers for a device. Raises ValueError for a CPU without the interpreter and for a GPU without bfloat16."""
    if INTERPRETED:
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"for the device {device} TRITON_INTERPRET=1 must be set before triton is first imported")
    return tuning_of(torch.cuda.get_device_capability(device))


def tuning_of(capability: tuple[int, int]) -> Tuning:
    """The numbers for a compute capability. What is newer gets those of what has as much shared memory: an estimate."""
    if capability < (8, 0):
        raise ValueError(f"the Triton kernels need compute capability 8.0 or newer, got {capability}")
    if capability in ((8, 6), (8, 9)) or capability >= (12, 0):
        return ADA
    return HOPPER if capability >= (9, 0) else AMPERE


def programs(device: torch.device, threads: int) -> int:
    """How many programs run at once: on a GPU as many as fit, in the interpreter as many as there are `threads`."""
    if INTERPRETED:
        return threads
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * tuning_for(device).programs


def dot_type(dtype: torch.dtype) -> Any:
    """The dtype in which pages of `dtype` are multiplied; products are summed in float32.

    In the interpreter float32 in place of bfloat16: numpy has none, and there conversion cuts off what it should round.
    """
    return _DOTS.get(dtype, tl.float32 if INTERPRETED else tl.bfloat16)


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Run `kernel` on a grid of programs. In the interpreter one at a time: it keeps its place in a global."""
    if not INTERPRETED:
        kernel[grid](**arguments, enable_fp_fusion=True)  # said aloud, since Triton is about to change its default
        return
    with _lock, np.errstate(invalid="ignore", over="ignore"):  # a GPU says nothing of infinities either
        kernel[grid](**arguments)
