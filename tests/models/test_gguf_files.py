"""GGUF headers: what they say lies inside the file, or they are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_writing import write_tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.errors import LaminaError, ModelFileError
from lamina.models.gguf_conversion import convert
from lamina.models.gguf_files import GgufFile


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


TENSOR = struct.Struct("<Q1sIQIQ")  # name length, name, dimensions, width, type, offset


def small_gguf(tensors: list[tuple[int, int, int]], data: int, metadata: bytes = b"", keys: int = 0) -> bytes:
    """A GGUF with tensors a, b, ... of (width, type, offset), and `data` bytes of data."""
    infos = b"".join(
        TENSOR.pack(1, bytes([97 + i]), 1, width, kind, offset) for i, (width, kind, offset) in enumerate(tensors)
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), keys) + metadata + infos
    return head + bytes(-len(head) % 32) + bytes(data)


F32, Q4_1 = 0, 3
KEY = struct.pack("<Q1s", 1, b"k")


@pytest.mark.fault("F26")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (small_gguf([(8, F32, 0)], 31), "ends at byte"),
        (small_gguf([(8, F32, 32)], 32), "ends at byte"),
        (small_gguf([(8, F32, 0), (8, F32, 16)], 64), "overlaps"),
        (small_gguf([(1 << 62, F32, 0)], 64), "ends at byte"),
        (small_gguf([((1 << 64) - 32, Q4_1, 0)], 64), "ends at byte"),
        (small_gguf([(8, F32, (1 << 64) - 8)], 64), "ends at byte"),
        (small_gguf([(33, Q4_1, 0)], 64), "multiples of 32"),
        (small_gguf([(0, F32, 0)], 64), "multiples of"),
        (small_gguf([(8, 99, 0)], 64), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "65536 of each"),
        (b"GGUF" + struct.pack("<IQQ", 3, 9, 0), "passes the end"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "65536 of each"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60), "string of"),
        (small_gguf([], 0, KEY + struct.pack("<IIQ", 9, 0, 1 << 60), 1), "array of"),
        (small_gguf([], 0, KEY + struct.pack("<IIQ", 9, 8, 1 << 20), 1), "passes the end"),
        (small_gguf([], 0, KEY + struct.pack("<IIQ", 9, 9, 1), 1), "array of type 9"),
        (small_gguf([], 0, KEY + struct.pack("<I", 77), 1), "value type 77"),
        (small_gguf([], 0, (KEY + struct.pack("<IB", 0, 1)) * 2, 2), "twice"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (b"PK\3\4" + bytes(64), "starts with"),
        (b"GG", "passes the end"),
        (b"", "cannot read"),
    ],
)
def test_gguf_files_that_lie_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "lying.gguf"
    path.write_bytes(content)
    with pytest.raises(LaminaError, match=message):
        GgufFile(path)


def test_arrays_are_bounded_together(tmp_path: Path) -> None:
    """Each was, but a file of 800 MB with 200 of them took more than 8 GB of memory."""
    path = tmp_path / "x.gguf"
    each, count = struct.pack("<IIQ", 9, 0, 1 << 22) + bytes(1 << 22), 5
    keys = b"".join(struct.pack("<Q", 1) + bytes([97 + i]) + each for i in range(count))
    path.write_bytes(small_gguf([], 0, keys, count))
    with pytest.raises(ModelFileError, match="arrays of more than 16777216 items together"):
        GgufFile(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q6_K"])
def test_rows_come_dequantised(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    code = gguf.GGMLQuantizationType[kind]
    values = random.standard_normal((70, 512), dtype=np.float32)
    if kind == "Q6_K":  # the library cannot write it, and any bytes are a valid block
        raw = random.integers(0, 60, (70, 512 // 256 * 210), dtype=np.uint8)
    else:
        raw = gguf.quants.quantize(values, code)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", raw, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    wanted = gguf.quants.dequantize(raw, code)
    assert file.tensors["a"].shape == values.shape
    assert np.array_equal(np.concatenate(list(file.rows("a"))), wanted)


def test_large_tensors_come_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(small_gguf([(8 << 20, F32, 0)], 32 << 20))  # one row is never cut
    assert [block.shape for block in GgufFile(path).rows("a")] == [(1, 8 << 20)]
    header = path.read_bytes()[:64].replace(struct.pack("<IQ", 1, 8 << 20), struct.pack("<IQQ", 2, 1024, 8192))
    path.write_bytes(header[:72].ljust(96, b"\0") + bytes(32 << 20))
    blocks = list(GgufFile(path).rows("a"))
    assert [block.shape for block in blocks] == [(4096, 1024)] * 2


@pytest.mark.fault("F26")
@given(position=st.integers(0, 1 << 20), value=st.integers(0, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_never_leads_out_of_the_file(tmp_path: Path, tiny_gguf: Path, position: int, value: int) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    header = min(tensor.offset for tensor in GgufFile(tiny_gguf).tensors.values())
    content[position % header] = value
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    try:
        file = GgufFile(path)
        for tensor in file.tensors.values():
            assert tensor.offset + tensor.nbytes <= len(content)
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        convert(file, folder, str(path), {})
    except LaminaError:
        return
