"""Tiny random models of transformers, and the decoder of the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from dense_attention import DenseAttention
from engine_rig import DEVICE
from safetensors.torch import load_file

from lamina_workers.decoder.model import Decoder
from lamina_workers.model_config.config import ModelConfig

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
PROMPT, DECODED = 41, 6


class Tensors(dict[str, torch.Tensor]):
    """A checkpoint in memory. Remembers what was released."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.released: list[str] = []

    def names(self) -> list[str]:
        return list(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self[name]

    def packed(self, name: str) -> None:
        return None

    def release(self, name: str) -> None:
        self.released.append(name)


def reference(kind: str, options: dict[str, object]) -> transformers.PreTrainedModel:
    """A random model of `kind` in float32. Norms and biases are random too, so that ignoring one shows."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias", "sinks")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model


def load(model: transformers.PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model.save_pretrained(folder)
    tensors = Tensors(load_file(folder / "model.safetensors"))
    return Decoder.load(ModelConfig.from_folder(folder), tensors, dtype, DEVICE)


def expected(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits of a prompt of `PROMPT` tokens, and of those decoded after it."""
    with torch.inference_mode():
        step = model(torch.tensor([tokens[:PROMPT]]), use_cache=True)
        logits = [step.logits[0]]
        for at in range(PROMPT, len(tokens)):
            step = model(torch.tensor([tokens[at : at + 1]]), past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits[0])
    return torch.cat(logits)


def check_against(model: transformers.PreTrainedModel, decoder: Decoder) -> None:
    """The same logits for the prompt at once, in chunks, and for tokens decoded after it."""
    tokens = torch.randint(3, 97, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(5)).tolist()
    wanted = expected(model, tokens)
    with torch.inference_mode():
        for chunks in ([PROMPT], [1, 7, PROMPT - 8]):
            sequence = DenseAttention(decoder, PROMPT)
            counts = [*chunks, *[1] * DECODED]
            found = [sequence.run(tokens[sequence.length : sequence.length + count]) for count in counts]
            torch.testing.assert_close(torch.cat(found), wanted, rtol=0, atol=1e-4)
