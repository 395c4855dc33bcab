"""Tiny models with a head for a token more (MTP), in the files' own layouts, and what transformers' layers draft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hybrid_families import FAMILIES
from real_workers import word_tokenizer
from reference_models import COMMON, reference
from safetensors.torch import load_file, save_file

EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    name: FAMILIES[name] for name in ("qwen3_5", "qwen3_5_moe", "qwen3_next")
} | {"deepseek_v3": ("deepseek_v3", LATENT)}
ALONE: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "first_k_dense_replace": 0}


class Head:
    """A model of a family and its head: random, or `good`: then each token follows from the one before it alone, and
    the head knows."""

    def __init__(self, family: str, folder: Path, good: bool = False) -> None:
        kind, options = MODELS[family]
        self.model = reference(kind, options)
        self.layer = reference(
            kind, options | ALONE | ({"mlp_only_layers": []} if "mlp_only_layers" in options else {})
        )
        hidden = COMMON["hidden_size"]
        generator = torch.Generator().manual_seed(11)
        self.norms = [1 + 0.2 * torch.randn(hidden, generator=generator) for _ in range(2)]
        self.join = 0.2 * torch.randn(hidden, 2 * hidden, generator=generator)
        offset = float(not kind.startswith("deepseek"))
        with torch.no_grad():
            for model in (self.model, self.layer):
                for name, weight in model.named_parameters():
                    if good and name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")):
                        weight.zero_()
                    if good and name == "model.norm.weight":
                        weight.fill_(1 - offset)
            if good:
                self.norms = [torch.ones(hidden)] * 2
                self.join = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), -1)
        self.model.save_pretrained(folder)
        word_tokenizer(folder, COMMON["vocab_size"])
        self.layer.save_pretrained(folder / "layer")
        own = load_file(folder / "layer" / "model.safetensors")
        prefix = f"model.layers.{self.model.config.num_hidden_layers}." if kind.startswith("deepseek") else "mtp."
        layer, norm, join, *norms = (
            (prefix, "shared_head.norm", "eh_proj", "enorm", "hnorm")
            if kind.startswith("deepseek")
            else ("mtp.layers.0.", "norm", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        )
        self.tensors = {
            name.replace("model.layers.0.", layer): weight
            for name, weight in own.items()
            if name.startswith("model.layers.0.")
        }
        self.tensors |= {f"{prefix}{norm}.weight": own["model.norm.weight"], f"{prefix}{join}.weight": self.join}
        self.tensors |= {f"{prefix}{n}.weight": x - offset for n, x in zip(norms, self.norms, strict=True)}
        tensors = load_file(folder / "model.safetensors") | self.tensors
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    @torch.inference_mode()
    def drafts(self, tokens: Sequence[int], count: int, first: int = 0) -> tuple[int, ...]:
        """What the head says comes behind tokens, one at a time; of those before `first` it knows nothing."""
        hidden = self.model.model(torch.tensor([tokens[:-1]]), use_cache=False).last_hidden_state[:, first:]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        text = list(tokens)
        for _ in range(count):
            parts = embedding(torch.tensor([text[first + 1 :]])), hidden
            normed = [self._norm(x, weight) for x, weight in zip(parts, self.norms, strict=True)]
            entering = torch.cat(normed, -1) @ self.join.T
            leaving = self.layer.model(inputs_embeds=entering, use_cache=False).last_hidden_state[:, -1:]
            text.append(int(head(leaving)[0, -1].argmax()))
            hidden = torch.cat((hidden, leaving), 1)
        return tuple(text[len(tokens) :])

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, self.model.config.rms_norm_eps)
