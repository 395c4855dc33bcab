"""One rank of a tensor-parallel model in a process of its own, for the tests: does one job, says what came of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from dense_attention import DenseAttention
from safetensors.torch import save_file

from lamina_workers.checkpoints.checkpoint import Checkpoint
from lamina_workers.decoder.decoder_weights import load_weights
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.shard import Collective, Shard, with_ranks
from lamina_workers.errors import RankLost
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.parallel.collectives import Meeting, join

CHUNKS = [7, 1, 14, 1, 1]
TIMEOUT = 20.0


class Read(torch.Tensor):
    """A tensor that counts the bytes of what is copied out of it or of its slices."""

    count = 0

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.copy_:
            Read.count += args[1].nbytes
        return super().__torch_function__(func, types, args, kwargs)


class ReadCheckpoint(Checkpoint):
    """A checkpoint of such tensors."""

    def tensor(self, name: str) -> torch.Tensor:
        return super().tensor(name).as_subclass(Read)


def tokens_of(config: ModelConfig) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(config.vocab_size, (sum(CHUNKS),), generator=generator).tolist()


def logits(folder: Path, group: Collective | None, shard: Shard, split_embedding: bool | None = None) -> torch.Tensor:
    """Of a checkpoint's test tokens, computed in chunks, by this rank; `dtype` is in the folder's name."""
    config = with_ranks(ModelConfig.from_folder(folder), shard.ranks)
    dtype = torch.bfloat16 if "bfloat16" in folder.name else torch.float32
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        decoder = Decoder.load(
            config, checkpoint, dtype, shard=shard, collective=group, split_embedding=split_embedding
        )
        sequence, tokens = DenseAttention(decoder, len(tokens_of(config))), tokens_of(config)
        return torch.cat([sequence.run(tokens[sequence.length : sequence.length + count]) for count in CHUNKS])


def families(shard: Shard, group: Collective, root: Path) -> dict[str, Any]:
    """The logits of every checkpoint in `root`, twice: with a whole embedding and with a split one."""
    shapes, read = {}, {}
    for folder in sorted(path for path in root.iterdir() if (path / "config.json").exists()):
        results = [logits(folder, group, shard, split) for split in (False, True)]
        shapes[folder.name] = list(results[0].shape)
        if shard.rank == 0:
            save_file({"whole": results[0], "split": results[1]}, root / f"{folder.name}.of{shard.ranks}.safetensors")
        Read.count = 0
        config = with_ranks(ModelConfig.from_folder(folder), shard.ranks)
        with ReadCheckpoint(folder) as checkpoint:
            load_weights(config, checkpoint, torch.float32, torch.device("cpu"), shard=shard)
        read[folder.name] = Read.count
    return {"shapes": shapes, "read": read, "sums": sums(shard, group), "seconds": group.seconds}


def sums(shard: Shard, group: Collective) -> list[str]:
    """What all_reduce got wrong. Its way changes with the size; the sum of a number must not."""
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        parts = [torch.randn(900, 200, generator=generator).to(dtype) for _ in range(shard.ranks)]
        expected = parts[0].float()
        for part in parts[1:]:
            expected = expected + part.float()
        for rows in (0, 1, 7, 900):
            found = parts[shard.rank][:rows].clone()
            if group.all_reduce(found) is not found or not torch.equal(found, expected[:rows].to(dtype)):
                wrong.append(f"{rows} rows of {dtype}")
    return wrong


def lost(shard: Shard, group: Collective, root: Path, how: str) -> dict[str, Any]:
    """Add up until the last rank dies or stops; then meet its successor, and add up once more."""
    victim = shard.ranks - 1
    x = torch.ones(8, 576)
    for _ in range(10):
        group.all_reduce(x)
    if shard.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    begun = time.monotonic()
    try:
        while True:
            group.all_reduce(x)
    except RankLost as error:
        message, took = str(error), time.monotonic() - begun
    try:
        group.all_reduce(x)
        left = ""
    except RankLost as error:
        left = str(error)
    return {"message": message, "took": took, "left": left} | again(shard, meeting(root, 1))


def again(shard: Shard, where: Meeting) -> dict[str, Any]:
    group = join(shard.rank, shard.ranks, where, TIMEOUT)
    return {"sum": group.all_reduce(torch.tensor([10.0**shard.rank])).item()}


def meeting(root: Path, generation: int) -> Meeting:
    return Meeting(generation, path=str(root / "meeting"))


def main() -> None:
    rank, ranks, root, job, *more = sys.argv[1:]
    torch.set_num_threads(1)
    shard, folder = Shard(int(rank), int(ranks)), Path(root)
    if job == "again":
        answer: Any = again(shard, meeting(folder, 1))
    elif job == "lost":
        timeout = TIMEOUT if more[0] == "kill" else 2.0
        answer = lost(shard, join(shard.rank, shard.ranks, meeting(folder, 0), timeout), folder, more[0])
    else:
        answer = families(shard, join(shard.rank, shard.ranks, meeting(folder, 0), TIMEOUT), folder)
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
