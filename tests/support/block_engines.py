"""A foreign engine that owns its blocks: sequences drawn to share prefixes, grow, be cut, preempted and reordered, and
what a step's attention must be, by its definition in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from lamina_protocols.messages.layers import BlockConfig, LayerSpec
from lamina_protocols.messages.messages import BlockTables

Int32 = np.ndarray


@dataclass(eq=False)
class Sequence:
    """K and V of its tokens in each layer, `[tokens, heads, d]`, and its blocks in each table."""

    blocks: list[list[int]]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int = 0


@dataclass
class Step:
    """One step: for each row its sequence, start and count."""

    rows: list[tuple[Sequence, int, int]]

    @property
    def tokens(self) -> int:
        return sum(count for _, _, count in self.rows)


@dataclass
class BlockEngine:
    """Draws steps. Blocks of a prefix that two sequences share are the same ones."""

    config: BlockConfig
    seed: int
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.owners = [0] * self.config.blocks
        self.tables = 1 + max(self.config.tables)
        self.batch = 0

    def drawn(self, most_rows: int = 5, most_tokens: int = 40) -> Step:
        draw = self.random
        if self.sequences and draw.random() < 0.15:
            self._free(draw.choice(self.sequences))
        while len(self.sequences) < most_rows and draw.random() < 0.4:
            self.sequences.append(self._forked() if self.sequences and draw.random() < 0.5 else self._new())
        if draw.random() < 0.2:
            draw.shuffle(self.sequences)
        if self.sequences and draw.random() < 0.1:  # a rejected draft, or a sequence that is computed again
            sequence = draw.choice(self.sequences)
            shorter = max(1, sequence.length - draw.randrange(1, 4)) if sequence.length else 0
            first = shorter // self.config.page_size
            if all(self.owners[block] == 1 for table in sequence.blocks for block in table[first:]):
                sequence.length = shorter
        rows = []
        for sequence in list(self.sequences):
            if draw.random() < 0.1:
                continue
            count = 1 if sequence.length and draw.random() < 0.8 else draw.randrange(1, most_tokens)
            if not self._grow(sequence, sequence.length + count):
                self._free(sequence)
                continue
            rows.append((sequence, sequence.length, count))
        return Step(rows) if rows else self.drawn(most_rows, most_tokens)

    def _new(self) -> Sequence:
        shapes = self.config.layers
        return Sequence(
            [[] for _ in range(self.tables)],
            [torch.empty(0, spec.kv_heads, spec.d_k) for spec in shapes],
            [torch.empty(0, spec.kv_heads, spec.d_v) for spec in shapes],
        )

    def _forked(self) -> Sequence:
        """With the whole blocks of another one's beginning."""
        other, size = self.random.choice(self.sequences), self.config.page_size
        blocks = self.random.randint(0, other.length // size)
        for table in other.blocks:
            for block in table[:blocks]:
                self.owners[block] += 1
        return Sequence(
            [table[:blocks] for table in other.blocks],
            [k[: blocks * size].clone() for k in other.keys],
            [v[: blocks * size].clone() for v in other.values],
            blocks * size,
        )

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        missing = -(-tokens // self.config.page_size) - len(sequence.blocks[0])
        free = [block for block, owners in enumerate(self.owners) if not owners]
        if missing * self.tables > len(free):
            return False
        self.random.shuffle(free)
        for table in sequence.blocks:
            for _ in range(missing):
                table.append(free.pop())
                self.owners[table[-1]] = 1
        return True

    def _free(self, sequence: Sequence) -> None:
        for block in (block for table in sequence.blocks for block in table):
            self.owners[block] -= 1
        self.sequences.remove(sequence)

    def announcement(self, step: Step, table: int) -> BlockTables:
        """The message of one block table."""
        self.batch += 1
        starts = np.cumsum([0, *(count for _, _, count in step.rows)], dtype=np.int32)
        lengths = np.array([start + count for _, start, count in step.rows], np.int32)
        width = max(len(sequence.blocks[table]) for sequence, _, _ in step.rows) + self.random.randrange(3)
        block_table = np.full((len(step.rows), width), -1, np.int32)
        for row, (sequence, _, _) in enumerate(step.rows):
            block_table[row, : len(sequence.blocks[table])] = sequence.blocks[table]
        return BlockTables(1, self.batch, table, *map(torch.from_numpy, (starts, lengths, block_table)))

    def layer(self, step: Step, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of a layer `[tokens, heads, d]`, which its sequences have from now on, and the right answer."""
        spec = self.config.layers[layer]
        q, k, v = (
            torch.randn(step.tokens, heads, width, generator=self.generator)
            for heads, width in ((spec.heads, spec.d_k), (spec.kv_heads, spec.d_k), (spec.kv_heads, spec.d_v))
        )
        out, at = [], 0
        for sequence, start, count in step.rows:
            rows = slice(at, at + count)
            sequence.keys[layer] = torch.cat([sequence.keys[layer][:start], k[rows]])
            sequence.values[layer] = torch.cat([sequence.values[layer][:start], v[rows]])
            out.append(attention(spec, q[rows], sequence.keys[layer], sequence.values[layer], start))
            at += count
        return q, k, v, torch.cat(out)

    def done(self, step: Step) -> None:
        """The tokens of the step are computed."""
        for sequence, start, count in step.rows:
            sequence.length = start + count


def attention(spec: LayerSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """float64 `[tokens, heads, d_v]`, of queries from position `start` on."""
    k, v = k.double().repeat_interleave(spec.group, 1), v.double().repeat_interleave(spec.group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    distance = torch.arange(start, start + len(q))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) | (distance >= (spec.window or len(k)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
