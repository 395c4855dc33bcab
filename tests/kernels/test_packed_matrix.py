"""Packed weights against the dequantisation of the `gguf` package, in float64, and against what they were made of."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from lamina_kernels.dense.dense import Linear
from lamina_kernels.packed import matrix as packed
from lamina_kernels.packed.layout import Format
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_kernels.packed.pack import BLOCKS, bytes_of, can_pack, pack_blocks, pack_codes
from lamina_kernels.packed.quantize import quantize

kinds = pytest.mark.parametrize("kind", BLOCKS)
SCALES = {"FP4": [0], "Q6_K": [208], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0]}  # bytes of a block where its float16 stand
SHAPES = [(1, 1), (16, 2), (17, 3), (5, 5), (70, 4)]  # rows and blocks of a row


def blocks_of(kind: str, n_out: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Any bytes, but scales about 0.01."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (n_out, blocks, BLOCKS[kind][2]), dtype=np.uint8)
    for at in SCALES.get(kind, [0, 2]):
        scales = random.standard_normal((n_out, blocks, 1)) * 0.01
        raw[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return torch.from_numpy(raw.reshape(n_out, -1))


def numbers_of(kind: str, raw: torch.Tensor) -> torch.Tensor:
    if kind == "FP4":  # Q4_0 with e2m1 in the place of numbers from -8 to 7
        blocks = raw.view(len(raw), -1, 18)
        scales = blocks[..., :2].contiguous().view(torch.float16).double()
        codes = torch.cat((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), -1).int()
        sizes = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.double)[codes & 7]
        return (scales * torch.where(codes > 7, -sizes, sizes)).flatten(1)
    return torch.from_numpy(dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])).double()


@kinds
@pytest.mark.parametrize(("n_out", "blocks"), SHAPES)
def test_is_what_gguf_makes_of_a_file(kind: str, n_out: int, blocks: int) -> None:
    raw = blocks_of(kind, n_out, blocks, seed=n_out)
    expected, matrix = numbers_of(kind, raw), pack_blocks(kind, raw)
    assert matrix.shape == tuple(expected.shape)
    assert matrix.nbytes == bytes_of(kind, *matrix.shape)
    found = matrix.unpack(torch.float32)
    assert expected.abs().max() > 0.01
    assert bool(((found.double() - expected).abs() <= 2**-22 * expected.abs().amax(1, keepdim=True)).all())
    assert torch.equal(matrix.unpack(torch.bfloat16), found.bfloat16())


@kinds
def test_gives_any_rows(kind: str) -> None:
    matrix = pack_blocks(kind, blocks_of(kind, 45, 3))
    whole = matrix.unpack(torch.float32)
    for rows in (slice(0, 1), slice(3, 14), slice(15, 17), slice(31, 45), slice(-2, None), slice(7, 7)):
        assert torch.equal(matrix.unpack(torch.float32, rows), whole[rows])
    ids = torch.tensor([[44, 0, 15], [16, 0, 31]])
    assert torch.equal(matrix.rows(ids, torch.float32), whole[ids])
    assert torch.equal(matrix.rows(ids.int(), torch.bfloat16), whole[ids].bfloat16())
    assert matrix.rows(ids[:0], torch.float32).shape == (0, 3, matrix.shape[1])


@kinds
def test_a_part_shares_the_memory(kind: str) -> None:
    matrix = pack_blocks(kind, blocks_of(kind, 45, 3))
    for rows in (slice(0, 16), slice(16, 45), slice(32, None), slice(None)):
        part = matrix.part(rows)
        assert part.data.untyped_storage().data_ptr() == matrix.data.untyped_storage().data_ptr()
        assert torch.equal(part.unpack(torch.float32), matrix.unpack(torch.float32, rows))
    for rows in (slice(0, 15), slice(8, 32), slice(16, 16), slice(0, 32, 2)):
        with pytest.raises(ValueError, match="multiples of 16"):
            matrix.part(rows)


@kinds
def test_rows_packed_in_turn_are_one_matrix(kind: str) -> None:
    raw = blocks_of(kind, 50, 2)
    whole = pack_blocks(kind, raw)
    into = torch.empty(whole.nbytes + 64, dtype=torch.uint8)
    into[-64:] = 7
    at = bytes_of(kind, 32, whole.shape[1])
    pack_blocks(kind, raw[:32], into)
    pack_blocks(kind, raw[32:], into[at:])
    matrix = PackedMatrix(whole.shape, whole.format, into[:-64])
    assert torch.equal(matrix.unpack(torch.float32), whole.unpack(torch.float32))
    assert bool((into[-64:] == 7).all())


@kinds
def test_rows_of_a_file_may_stand_apart(kind: str) -> None:
    raw = blocks_of(kind, 40, 2)
    wide = torch.cat((raw, raw), 1)[::2, : raw.shape[1]]
    assert not wide.is_contiguous()
    found = pack_blocks(kind, wide).unpack(torch.float32)
    assert torch.equal(found, pack_blocks(kind, raw).unpack(torch.float32)[::2])


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_is_refused_with_its_row(kind: str, value: float) -> None:
    for at in SCALES.get(kind, [0, 2]):
        raw = blocks_of(kind, 90, 3)
        for row in (37, 80):
            start = BLOCKS[kind][2] * 2 + at
            raw[row, start : start + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        with pytest.raises(ValueError, match="row 37 has a scale that is not finite"):
            pack_blocks(kind, raw)


def test_refuses_blocks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of Q4_0.*'IQ4_NL'"):
        pack_blocks("IQ4_NL", torch.zeros(1, 18, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"multiple of 18 bytes, got 19"):
        pack_blocks("Q4_0", torch.zeros(1, 19, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"multiple of 18 bytes, got 0"):
        pack_blocks("Q4_0", torch.zeros(1, 0, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must have rows"):
        pack_blocks("Q4_0", torch.zeros(0, 18, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"raw must be torch.uint8"):
        pack_blocks("Q4_0", torch.zeros(1, 18))
    with pytest.raises(ValueError, match=r"at least 576\], got torch.uint8 \[575\]"):
        pack_blocks("Q4_0", torch.zeros(1, 18, dtype=torch.uint8), torch.zeros(575, dtype=torch.uint8))
    with pytest.raises(ValueError, match="64-byte aligned"):
        pack_blocks("Q4_0", torch.zeros(1, 18, dtype=torch.uint8), torch.zeros(640, dtype=torch.uint8)[8:])


def test_what_can_be_packed() -> None:
    assert all(can_pack(kind, 5, BLOCKS[kind][1] * 3) for kind in BLOCKS)
    assert not any(can_pack(kind, 5, BLOCKS[kind][1] * 3 + 16) for kind in BLOCKS)
    assert not can_pack("Q4_K", 16, 896)
    assert can_pack("int8", 1, 32)
    assert not can_pack("F16", 16, 32)
    with pytest.raises(ValueError, match="kind must be one of"):
        bytes_of("F16", 16, 32)


@pytest.mark.parametrize(("bits", "minima"), [(4, False), (4, True), (5, False), (5, True), (8, False)])
@pytest.mark.parametrize(("n_out", "n_in", "columns"), [(1, 32, 32), (19, 96, 96), (40, 256, 128), (3, 192, 64)])
def test_codes(bits: int, minima: bool, n_out: int, n_in: int, columns: int) -> None:
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n_out, n_in), dtype=torch.uint8)
    scales = torch.rand(n_out, n_in // columns).half().float()
    mins = (scales * -torch.randint(0, 16, scales.shape)).half().float() if minima else None
    matrix = pack_codes(codes, scales, mins, bits=bits)
    wide = [x.double().repeat_interleave(columns, 1) for x in (scales, scales if mins is None else mins)]
    zero = 0 if minima else 2 ** (bits - 1)
    expected = (codes.double() - zero) * wide[0] + (wide[1] if minima else 0)
    torch.testing.assert_close(matrix.unpack(torch.float32).double(), expected, rtol=1e-6, atol=1e-6)


def test_refuses_codes_that_do_not_fit() -> None:
    codes, scales = torch.zeros(40, 64, dtype=torch.uint8), torch.ones(40, 2)
    for bits, number in ((4, 16), (5, 32)):
        wrong = codes.clone()
        wrong[21, 63] = number
        with pytest.raises(ValueError, match=f"row 21 has a code above {number - 1}"):
            pack_codes(wrong, scales, bits=bits)
    for name, value in (("scales", 1e6), ("mins", float("nan"))):
        given = {"scales": scales, "mins": scales, name: scales.clone()}
        given[name][3, 1] = value
        with pytest.raises(ValueError, match=f"row 3 has {name} that are not finite in float16"):
            pack_codes(codes, given["scales"], given["mins"])
    with pytest.raises(ValueError, match="bits must be 4, 5 or, without minima, 8; got 8 with minima"):
        pack_codes(codes, scales, scales, bits=8)
    with pytest.raises(ValueError, match=r"scales must be \[40, 64 / g\] for g a multiple of 32 or 64, got \[40, 4\]"):
        pack_codes(codes, torch.ones(40, 4))
    with pytest.raises(ValueError, match=r"mins must be \[40, 2\]"):
        pack_codes(codes, scales, scales[:, :1])
    with pytest.raises(ValueError, match=r"codes must be \[n_out, a multiple of 32\], got \[40, 48\]"):
        pack_codes(codes[:, :48], scales)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.1), (8, 0.007)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantises(bits: int, most: float, dtype: torch.dtype) -> None:
    weight = torch.randn(33, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3] = 0
    matrix = quantize(weight, bits)
    assert matrix.format is (Format.U4 if bits == 4 else Format.U8)
    error = matrix.unpack(torch.float32) - weight.float()
    assert float(error.norm() / weight.float().norm()) < most
    assert not matrix.unpack(torch.float32, slice(3, 4)).any()


def test_quantising_keeps_what_four_bits_hold() -> None:
    codes = torch.randint(-8, 8, (20, 96), generator=torch.Generator().manual_seed(2))
    codes[:, ::32] = -8  # every block has its largest
    weight = codes * 0.5
    assert torch.equal(quantize(weight, 4).unpack(torch.float32), weight)


def test_refuses_to_quantise_what_is_not_finite() -> None:
    weight = torch.ones(40, 64)
    for value in (float("nan"), float("inf")):
        weight[23, 7] = value
        with pytest.raises(ValueError, match="row 23 is not finite"):
            quantize(weight, 4)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        quantize(weight, 3)
    with pytest.raises(ValueError, match=r"weight must be floats \[n_out, a multiple of 32\]"):
        quantize(weight[:, :40], 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "unpacked"), [(0, True), (1, True), (40, True), (0, False), (7, False), (261, False)])
@kinds
def test_multiplies(kind: str, rows: int, unpacked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "multiplies_unpacked", lambda: unpacked)  # as on other machines
    matrix = pack_blocks(kind, blocks_of(kind, 45, 3))
    x = torch.randn(rows, matrix.shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected = x.double() @ matrix.unpack(torch.float32).double().T
    for wanted in (dtype, torch.float32):
        found = matrix.multiply(x, wanted)
        assert (found.dtype, found.shape) == (wanted, expected.shape)
        if rows:  # a code of x is at most 1/254 of a block's largest number wrong, or a number of W is rounded
            assert float((found.double() - expected).norm() / expected.norm()) < 0.01


def test_without_a_library_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "multiplies_unpacked", lambda: False)
    matrix, x = pack_blocks("Q4_K", blocks_of("Q4_K", 45, 3)), torch.randn(300, 768).bfloat16()
    whole = matrix.multiply(x)
    for rows in (slice(0, 1), slice(250, 290), slice(299, 300)):
        assert torch.equal(matrix.multiply(x[rows]), whole[rows])


def test_unpacks_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "multiplies_unpacked", lambda: True)
    matrix, x = pack_blocks("Q5_1", blocks_of("Q5_1", 45, 3)), torch.randn(50, 96).bfloat16()
    whole = matrix.multiply(x, torch.float32)
    monkeypatch.setattr(packed, "_BUFFER", 1)
    torch.testing.assert_close(matrix.multiply(x, torch.float32), whole, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9, 70])
def test_a_linear_map_of_parts(rows: int, bias: bool) -> None:
    parts = [pack_blocks(kind, blocks_of(kind, n, 2)) for kind, n in (("Q4_K", 32), ("Q4_K", 48), ("Q6_K", 21))]
    weight = torch.cat([part.unpack(torch.float32) for part in parts])
    offset = torch.randn(101).bfloat16() if bias else None
    linear, x = Linear(parts, offset), torch.randn(rows, 512).bfloat16()
    expected = x.double() @ weight.double().T + (offset.double() if offset is not None else 0)
    assert (linear.n_out, linear.n_in) == (101, 512)
    halves = linear.split(64)
    assert linear.split(64) is halves
    assert [half.n_out for half in halves] == [64, 37]
    for found in (linear(x), torch.cat([half(x) for half in halves], 1), linear.float32(x)):
        assert found.shape == expected.shape
        if rows:
            assert float((found.double() - expected).norm() / expected.norm()) < 0.01
    assert linear.float32(x).dtype is torch.float32


def test_refuses_maps_that_do_not_fit() -> None:
    narrow, wide = (pack_blocks("Q8_0", blocks_of("Q8_0", 40, n)) for n in (1, 2))
    with pytest.raises(ValueError, match=r"one n_in, got 2 with \[32, 64\]"):
        Linear([narrow, wide])
    with pytest.raises(ValueError, match="got 0 with"):
        Linear([])
    with pytest.raises(ValueError, match="multiples of 16"):
        Linear(narrow).split(8)
    with pytest.raises(ValueError, match=r"x must be \[n, 32\].*got torch.bfloat16 \[1, 64\]"):
        narrow.multiply(torch.zeros(1, 64).bfloat16())
    with pytest.raises(IndexError, match="ids must be from 0 to 39, got 0 to 40"):
        narrow.rows(torch.tensor([0, 40]), torch.float32)
    with pytest.raises(ValueError, match="dtype must be one of"):
        narrow.unpack(torch.float16)
    with pytest.raises(ValueError, match=r"K4 cannot hold \[16, 128\]"):
        PackedMatrix((16, 128), Format.K4, narrow.data)
    with pytest.raises(ValueError, match=r"data must be uint8 \[3264\]"):
        PackedMatrix((40, 32), Format.U8, narrow.data[:64])
    elsewhere = torch.zeros(40, 32, device="meta")
    with pytest.raises(ValueError, match=r"on a CPU, got .* on meta"):
        quantize(elsewhere, 4)
    with pytest.raises(ValueError, match="scales and mins must be on a CPU"):
        pack_codes(torch.zeros(40, 32, dtype=torch.uint8), elsewhere[:, :1])
