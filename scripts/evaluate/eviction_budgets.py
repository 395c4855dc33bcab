#!/usr/bin/env python3
"""Finds how much each KV head must read, and writes it as a policy file:

    scripts/evaluate/eviction_budgets.py --context 8192 --share 0.34 --out budgets.toml

For the last tokens of some texts, the model is run in float32 beside the full cache. What a head's output loses at each
budget is weighed by the Fisher information (lamina/measure/calibration/evidence.py), which estimates the KL divergence
that it causes. Budgets are then dealt to the heads where they save most, until --share of the KV is read. heavy_hitter
reads the pages with most attention by a sample of the prompt's queries, razor the last ones and a mean for the others.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.measure.calibration.calibrate import Workbench
from lamina.measure.calibration.capture import Captured, TorchPath, attend, capture, joined
from lamina.measure.calibration.data import corpus
from lamina.policy_file import Heads, PolicyFile, write
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.policies.compared.heavy_hitter import HeavyHitter
from lamina_workers.policies.full import Full

SHARES = (0.05, 0.08, 0.12, 0.17, 0.23, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)  # of the KV that a head may read
SINK, RECENT, PAGE = 64, 256, 32  # tokens
CHUNK = 1024  # tokens
SAMPLES = 3  # draws of the Fisher information
POLICIES = ("heavy_hitter", "razor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--policy", default=POLICIES[0], choices=POLICIES)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--share", type=float, default=0.34, help="of the KV that is to be read")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="text files, beside Python's own help topics")
    parser.add_argument("--texts", type=int, default=1, help="pieces of each text")
    parser.add_argument("--queries", type=int, default=128, help="last tokens of each piece, by which heads are judged")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cost = np.zeros(0)
    with Workbench.open(args.model, EngineConfig(threads=args.threads)) as bench:
        with open_checkpoint(bench.path) as checkpoint:
            path = TorchPath(bench.model, checkpoint)
        for text in [None, *args.text]:
            ids = corpus(bench.tokenizer, text, args.texts * args.context).calibration
            for piece in range(args.texts):
                tokens = ids[piece * args.context : (piece + 1) * args.context]
                prompt = tokens[: -args.queries]
                with torch.inference_mode():
                    layers = capture(bench.probe(args.context), prompt, sampled(len(prompt)))
                found = losses(path, [_owned(layer) for layer in layers], tokens[-args.queries :], args.policy)
                cost = cost + found if cost.size else found
                print(f"{text or 'help topics'}, piece {piece}: {np.round(found.sum((0, 1)), 4).tolist()}", flush=True)
        shares = dealt(cost, args.share)
        heads = tuple(tuple(policy(args.policy, share, args.context) for share in layer) for layer in shares)
        write_file(args.out, args.model, fingerprint(bench.path), heads, args, float(np.mean(shares)))


def _owned(layer: Captured) -> Captured:
    """The same outside of inference mode, for gradients."""
    return Captured(*(x.clone() for x in (layer.q, layer.k, layer.v)))


def losses(path: TorchPath, context: Sequence[Captured], token_ids: Sequence[int], policy: str) -> np.ndarray:
    """Estimated KL divergence in nats a token, float64 `[layers, kv_heads, SHARES]`, where one KV head reads such a
    share of the tokens before `token_ids`."""
    start, marks = context[0].k.shape[1], list[torch.Tensor]()
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = joined(context[layer], k, v)
        asked.append((q.detach(), keys.detach(), values.detach()))
        marks.append(torch.zeros_like(q, requires_grad=True))
        return attend(path.specs[layer], Full(), q, keys, values, start) + marks[-1]

    logits = path.logits(path.hidden(torch.tensor(token_ids), attention, start))
    likelihood = torch.log_softmax(logits, -1)
    drawn_from, generator = likelihood.detach().exp(), torch.Generator().manual_seed(0)
    gradients = []
    for sample in range(SAMPLES):
        drawn = torch.multinomial(drawn_from, 1, generator=generator)
        chosen = likelihood.gather(1, drawn).sum()
        gradients.append(torch.autograd.grad(chosen, marks, retain_graph=sample + 1 < SAMPLES))
    total = np.zeros((len(asked), asked[0][1].shape[0], len(SHARES)))
    for layer, of_layer in enumerate(asked):
        for head, (q, k, v) in enumerate(zip(*of_layer, strict=True)):
            scale = path.specs[layer].scale
            outs = outputs(q, k, v, ranked(context[layer], head, scale, policy), scale, start, policy)
            for sampled in gradients:
                moved = ((outs - outs[-1]) * sampled[layer][head]).sum((1, 3))  # [SHARES, queries]
                total[layer, head] += moved.square().mean(-1).double().numpy() / 2 / SAMPLES
    return total


def sampled(prompt: int) -> list[int]:
    """The positions of a prompt whose queries are counted, where it is read in rows of CHUNK tokens."""
    rows = range(0, prompt, CHUNK)
    strides = {first: HeavyHitter().sampled(first, prompt) for first in rows}
    return [at for first in rows for at in range(first, min(first + CHUNK, prompt), strides[first])]


def ranked(context: Captured, head: int, scale: float, policy: str) -> torch.Tensor:
    """The place of each page of the context, int64 `[pages]`, in the order in which they would be held."""
    k = context.k[head].float()
    pages = -(-len(k) // PAGE)
    if policy == "razor":
        got = torch.arange(pages, dtype=torch.float32)
    else:
        q = context.q[head].float()  # [group, sampled, d]
        at = torch.tensor(sampled(len(k)))
        hidden = torch.arange(len(k)) > at[:, None]
        shares = (q @ k.T * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        shares = torch.nn.functional.pad(shares, (0, pages * PAGE - len(k))).unflatten(2, (pages, PAGE)).sum(-1)
        seen = at[:, None] // PAGE > torch.arange(pages)
        got = ((shares * seen).sum(1) / seen.sum(0).clamp(min=1)).amax(0)
        got[-RECENT // PAGE :] = torch.inf
    got[: SINK // PAGE] = torch.inf
    return got.argsort(descending=True, stable=True).argsort()


def outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: torch.Tensor, scale: float, start: int, policy: str
) -> torch.Tensor:
    """A head's output at each of SHARES, `[SHARES, group, n, d]`; q `[group, n, d]`, k and v `[start + n, d]`."""
    n, own = q.shape[1], torch.full((len(k) - start,), -1)
    places = torch.cat([ranks.repeat_interleave(PAGE)[:start], own])
    logits = q @ k.T * scale
    logits[..., start:] += torch.full((n, n), -torch.inf).triu(1)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    outs = []
    for share in SHARES:
        held = places < max(share * len(ranks), (SINK + RECENT) // PAGE)
        over, under = weights[..., held] @ v[held], weights[..., held].sum(-1, keepdim=True)
        if policy == "razor" and not held.all():
            slot = q @ k[~held].mean(0) * scale + math.log(int((~held).sum())) - logits.amax(-1)
            weight = slot.exp().unsqueeze(-1)
            over, under = over + weight * v[~held].mean(0), under + weight
        outs.append(over / under)
    return torch.stack(outs)


def dealt(cost: np.ndarray, share: float) -> np.ndarray:
    """A share of SHARES for each layer and head, float64 `[layers, kv_heads]`, on average `share`: always the step up
    that saves most for what it takes."""
    flat = np.minimum.accumulate(cost.reshape(-1, len(SHARES)), axis=1)
    at, used, heap = np.zeros(len(flat), int), SHARES[0] * len(flat), list[tuple[float, int, int]]()

    def offer(head: int) -> None:
        here = at[head]
        steps = [
            (-(flat[head, here] - flat[head, to]) / (SHARES[to] - SHARES[here]), head, to)
            for to in range(here + 1, len(SHARES))
        ]
        if steps:
            heapq.heappush(heap, min(steps))

    for head in range(len(flat)):
        offer(head)
    while heap:
        _, head, to = heapq.heappop(heap)
        step = SHARES[to] - SHARES[at[head]]
        if used + step <= share * len(flat):
            used += step
            at[head] = to
            offer(head)
    return np.array(SHARES)[at].reshape(cost.shape[:2])


def policy(name: str, share: float, context: int) -> str:
    """The text of a head's policy that reads this share of `context` tokens."""
    if share >= 1:
        return "full"
    if name == "razor":
        return f"razor(sink={SINK}, recent={RECENT}, share={max(0.0, share - SINK / context):.3f})"
    budget = max(0.0, (share * context - SINK - RECENT) / (context - RECENT))
    return f"heavy_hitter(sink={SINK}, recent={RECENT}, budget={budget:.3f})"


def write_file(out: Path, model: str, made_of: str, heads: Heads, args: argparse.Namespace, kept: float) -> None:
    about = {"method": f"budgets of {args.policy}", "context": args.context, "kv_read": round(kept, 4)}
    write(out, PolicyFile(model, made_of, heads, about))
    print(f"{out}: {kept:.3f} of the KV at {args.context} tokens")


if __name__ == "__main__":
    main()
