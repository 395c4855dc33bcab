"""Where the numbers of a packed W `[n_out, n_in]` stand.

W is cut into tiles of 16 rows, and a tile into groups of `Layout.group` columns. A tile's groups follow one another,
a record each, and the tiles do too: all that a thread reads is one stream, 64-byte aligned. n_out is padded to whole
tiles, and n_in to whole groups, with zeros.

A record begins with its blocks, of 32 columns each. Within a block, quad q is the columns 4q to 4q + 3, and a vector
is 64 bytes, of which row r of the tile has bytes 4r to 4r + 3, one for each column of a quad. Codes are unsigned.

- 4 bits and more, but not 8: vector q of 4 has the low bits of quad q in the lower half of each byte, those of quad
  q + 4 in the upper half.
- The fifth bit: mask q of 8, a uint64, has in bit 4r + j that of row r and column 4q + j.
- Bits 4 and 5 of six: vector v of 2 has in bits 2f and 2f + 1 of each byte those of quad 4v + f.
- 8 bits: vector q of 8 has quad q.

Behind the blocks stand the scales and minima, each an array with 16 numbers, one for each row, for every block (`K6`:
every half of a block); and for the K formats a float16 factor of the scales and one of the minima, 16 numbers each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

ROWS = 16
"""Rows of a tile."""

BLOCK = 32
"""Columns of a block."""


class Format(IntEnum):
    """How a code becomes a number. `scale` and `min` are float16 for a block of a row, unless something else is said.

    U4, U5, U8: scale * (code - 8), - 16, - 128. F4: scale * (x - 12), for the x that `Emitter.e2m1` gives. U4M, U5M:
    scale * code + min. K4, K5: d * scale * code - dmin * min, scale and min uint8, d and dmin float16 for 256 columns.
    K6: d * scale * (code - 32), scale int8 for 16 columns.
    """

    U4 = 0
    U4M = 1
    U5 = 2
    U5M = 3
    U8 = 4
    K4 = 5
    K5 = 6
    K6 = 7
    F4 = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """A format's record: offsets and sizes in bytes. -1: the format has no such array."""

    bits: int  # of a code
    group: int  # columns of a record
    block: int  # bytes of a block: its codes, and behind them the masks or the high bits
    high: int  # within a block, the masks of five bits and the high bits of six
    zero: int  # the code, or what the table has for it, that stands for 0; -1: there are minima
    scale: int  # float16 [blocks, 16]; K4, K5: uint8 [blocks, 16]; K6: int8 [2 * blocks, 16]
    min: int  # as the scales
    d: int  # float16 [16]
    dmin: int  # float16 [16]
    record: int

    @property
    def table(self) -> bool:
        """Codes stand for numbers in a table."""
        return self.zero == 12

    @property
    def blocks(self) -> int:
        return self.group // BLOCK

    def groups(self, n_in: int) -> int:
        """Records of a tile."""
        return -(-n_in // self.group)


def _plain(bits: int, minima: bool) -> Layout:
    """A record of two blocks with float16 scales."""
    block, zero = _block(bits), -1 if minima else 1 << (bits - 1)
    scale = 2 * block
    end = scale + 2 * ROWS * 2
    return Layout(bits, 64, block, _high(bits), zero, scale, end if minima else -1, -1, -1, end + 2 * ROWS * 2 * minima)


def _super(bits: int) -> Layout:
    """A record of eight blocks whose scales have a factor."""
    block, scale = _block(bits), 8 * _block(bits)
    if bits == 6:
        d = scale + 16 * ROWS
        return Layout(bits, 256, block, _high(bits), 32, scale, -1, d, -1, d + 64)  # to whole lines
    minima, d = scale + 8 * ROWS, scale + 16 * ROWS
    return Layout(bits, 256, block, _high(bits), -1, scale, minima, d, d + 2 * ROWS, d + 4 * ROWS)


def _block(bits: int) -> int:
    return BLOCK * ROWS * bits // 8


def _high(bits: int) -> int:
    return 256 if bits in (5, 6) else -1


LAYOUTS: dict[Format, Layout] = {
    Format.U4: _plain(4, False),
    Format.U4M: _plain(4, True),
    Format.U5: _plain(5, False),
    Format.U5M: _plain(5, True),
    Format.U8: _plain(8, False),
    Format.K4: _super(4),
    Format.K5: _super(5),
    Format.K6: _super(6),
    Format.F4: replace(_plain(4, False), zero=12),
}


def tiles_of(n_out: int) -> int:
    return -(-n_out // ROWS)


def tile_bytes(format: Format, n_in: int) -> int:
    layout = LAYOUTS[format]
    return layout.groups(n_in) * layout.record


def packed_bytes(format: Format, n_out: int, n_in: int) -> int:
    """Bytes of a packed W `[n_out, n_in]`, padding included."""
    return tiles_of(n_out) * tile_bytes(format, n_in)
