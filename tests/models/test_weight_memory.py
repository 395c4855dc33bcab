"""What weights take in memory, by the ways to keep them."""

from __future__ import annotations

from pathlib import Path

from real_workers import write_tiny_model

from lamina.models.weight_memory import weight_memory


def test_floats_may_be_kept_in_four_ways(tmp_path: Path) -> None:
    """By hand. 3 layers of matrices [64, 96] (2), [96, 64] (3) and [48, 64] (2), two tables [101, 64], 7 norms of 64.

    In tiles of 16 rows and 64 columns, padded: 4 x 2 tiles twice, 6 x 1 three times and 3 x 1 twice are 40 a layer,
    the tables 7 each. A tile has 16 x 64 codes and 2 x 16 scales of 2 bytes: 1,088 bytes in 8 bits, 576 in 4.
    """
    found = weight_memory(write_tiny_model(tmp_path / "tiny"))
    parameters = 3 * (2 * 64 * 96 + 3 * 96 * 64 + 2 * 48 * 64) + 2 * 101 * 64 + 7 * 64
    assert (found.parameters, found.stored) == (parameters, 4 * parameters)
    assert found.ways == {
        "bfloat16": 2 * parameters,
        "float32": 4 * parameters,
        "int8": 134 * 1088 + 7 * 64 * 2,
        "int4": 120 * 576 + 14 * 1088 + 7 * 64 * 2,
    }


def test_what_the_kernels_cannot_pack_is_counted_as_floats(tmp_path: Path) -> None:
    """`hidden_size` 48 is no multiple of 32: of a layer only the map from the MLP's 96 is packed, 3 x 2 tiles."""
    found = weight_memory(write_tiny_model(tmp_path / "tiny", hidden_size=48, head_dim=8))
    packed = 3 * 48 * 96
    assert found.ways["int8"] == 3 * 6 * 1088 + 2 * (found.parameters - packed)
