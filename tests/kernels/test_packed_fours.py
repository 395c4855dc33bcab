"""Products of fours are exact with every instruction, on the numbers that come nearest to an overflow."""

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba.core.registry import cpu_target

from lamina_kernels.compile.emitter import I64, VI, Emitter, cpu_has
from lamina_kernels.packed.micro import Fours, fours_of_cpu, multiply_fours

ZEROS = {4: 8, 5: 16, 6: 32, 8: 128}


def function(kind: Fours, bits: int) -> str:
    """IR of f(codes, x, zeros, out), for addresses of 8 quads."""
    module = ir.Module()
    made = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 4), "f")
    e = Emitter(ir.IRBuilder(made.append_basic_block()))
    codes, x, zeros, out = (e.pointer(a) for a in made.args)
    quads = [e.load(e.at(codes, 64 * q), VI) for q in range(8)]
    e.store(multiply_fours(e, kind, quads, [e.at(x, 4 * q) for q in range(8)], bits, zeros), out)
    e.b.ret_void()
    return str(module)


def compiled(text: str, triple: str, cpu: str, features: str) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=2, jit=True)
    return module, machine


@pytest.mark.parametrize("bits", ZEROS)
@pytest.mark.parametrize("kind", Fours, ids=lambda kind: kind.name)
def test_sums_are_exact(kind, bits):
    wanted = "avx512vl" if kind is Fours.VNNI_HALF else kind.value  # which has the same instruction
    if wanted and not cpu_has(wanted):
        pytest.skip(f"this CPU has no {wanted}")
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    module, machine = compiled(function(kind, bits), llvm.get_process_triple(), str(cpu), str(features))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(engine.get_function_address("f"))
    draw, most = np.random.default_rng(bits), (1 << bits) - 1
    for codes, x in (
        (np.full((8, 16, 4), most), np.full(32, 127)),
        (np.full((8, 16, 4), most), np.full(32, -127)),
        (np.zeros((8, 16, 4)), np.full(32, -127)),
        (draw.integers(0, most + 1, (8, 16, 4)), draw.integers(-127, 128, 32)),
    ):
        codes, x = codes.astype(np.uint8), x.astype(np.int8)
        zeros, out = np.array([-ZEROS[bits] * int(x.sum())], np.int32), np.zeros(16, np.int32)
        run(*(array.ctypes.data for array in (codes, x, zeros, out)))
        exact = np.einsum("qrj,qj->r", codes.astype(int) - ZEROS[bits], x.reshape(8, 4).astype(int))
        assert (out == exact).all()


@pytest.mark.parametrize("bits", ZEROS)
@pytest.mark.parametrize(
    ("kind", "triple", "cpu", "features", "instruction"),
    [
        (Fours.DOT, "aarch64-unknown-linux-gnu", "neoverse-n1", "+dotprod", "sdot"),
        (Fours.VNNI_HALF, "x86_64-unknown-linux-gnu", "alderlake", "+avxvnni", "vpdpbusd"),
    ],
)
def test_other_cpus_get_their_instruction(kind, triple, cpu, features, instruction, bits):
    try:
        module, machine = compiled(function(kind, bits), triple, cpu, features)
    except RuntimeError:
        pytest.skip(f"this LLVM does not know {triple}")
    assert machine.emit_assembly(module).count(instruction) >= (32 if kind is Fours.DOT else 16)


def test_the_cpu_has_what_is_chosen():
    kind = fours_of_cpu()
    assert kind is Fours.PLAIN or cpu_has(kind.value)
