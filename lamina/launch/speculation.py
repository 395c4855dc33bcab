"""What proposes drafts, built: the checks of a config against the model, a draft model's files, and its loading."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lamina.config import EngineConfig
from lamina.engine.draft_model import LOCAL, DraftModel, DraftModelProposer
from lamina.engine.drafting import NgramProposer, Proposer
from lamina.engine.mtp import MtpProposer
from lamina.errors import InvalidRequest, UnsupportedModelError
from lamina.launch.kv_sizing import Sizes, check_fits, holder_config, state_pools
from lamina.launch.model_files import ModelFiles, load
from lamina.system.machine import this_machine
from lamina.system.progress import Progress
from lamina.text.tokenizer import Tokenizer
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.checkpoints.weight_loader import Packing
from lamina_workers.converted.models import Weights, decoder_of, way
from lamina_workers.decoder.decoder_weights import DecoderWeights
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.mtp import MtpDecoder, load_mtp, mtp_config, mtp_tensors
from lamina_workers.decoder.shard import WHOLE
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_worker.model_worker import ModelWorker, prepare_kernels
from lamina_workers.ports.port import LocalAttention

NGRAM, MTP = "ngram", "mtp"


@dataclass(frozen=True, slots=True)
class DraftFiles:
    """A draft model that fits the model: its files, what of its weights stays packed, what its holder is built from,
    and how many token ids both know."""

    files: ModelFiles
    packing: Packing
    holder: HolderConfig
    vocabulary: int


def find_drafts(files: ModelFiles, sizes: Sizes, config: EngineConfig, progress: Progress | None) -> DraftFiles | None:
    """Check what the config says of speculation, and read the files of a draft model if it names one.

    Raises InvalidRequest where the draft model keeps states or has another vocabulary, or the model has no head for
    drafts, NotEnoughMemory where a draft model does not fit beside the model, and what `load` raises.
    """
    if config.speculate is None or config.speculate == NGRAM:
        return None
    draft_config = EngineConfig(
        dtype=config.dtype,
        weights="auto" if config.weights == "packed" else config.weights,  # the draft's file may have them otherwise
        kv_dtype=config.kv_dtype,
        page_size=config.page_size,
        kv_memory=sizes.holder.kv_memory,
    )
    if config.speculate == MTP:
        _check_head(files.path, files.model, config)
        holder = holder_config(files.path, mtp_config(files.model), draft_config, sizes.dtype, this_machine())
        return DraftFiles(files, sizes.packing, _as_long(holder, sizes), files.model.vocab_size)
    draft = load(config.speculate, draft_config, progress)
    try:
        _check_vocabulary(config, files.tokenizer, draft.tokenizer)
    finally:
        draft.tokenizer.close()
    holder = holder_config(draft.path, draft.model, draft_config, sizes.dtype, this_machine())
    if state_pools(holder):
        raise InvalidRequest(
            f"speculate is {str(config.speculate)!r:.80}, but {draft.model.architecture} has layers that keep a state: "
            "a draft model goes back to any token, where it has no records of its states; allowed is one without, or "
            '"ngram"'
        )
    vocabulary = min(files.model.vocab_size, draft.model.vocab_size)
    packing = draft.packing(draft_config, (sizes.device,), sizes.dtype)
    holder = _as_long(holder, sizes)
    if not config.force and sizes.attention_device.type == "cpu":
        weights, kv = sizes.taken
        if sizes.device.type == "cpu":
            weights += draft.kept_bytes(sizes.dtype, packing)
        check_fits(draft.path, weights, kv + holder.kv_memory, this_machine())
    return DraftFiles(draft, packing, holder, vocabulary)


def _check_head(path: Path, model: ModelConfig, config: EngineConfig) -> None:
    """Refuse a model without a head for a token more, and one that is not in this process alone."""
    try:
        if config.model_workers > 1:
            raise UnsupportedModelError(f"model_workers is {config.model_workers}, and the head runs beside one alone")
        if way(model) == "converted":
            raise UnsupportedModelError(f"{model.architecture} is converted, and its head is not")
        with open_checkpoint(path) as checkpoint:
            mtp_tensors(model, checkpoint)
    except UnsupportedModelError as error:
        raise InvalidRequest(f'speculate is {MTP!r}, but {error}; allowed here are "ngram" and a model') from error


def _as_long(holder: HolderConfig, sizes: Sizes) -> HolderConfig:
    """Of a draft model, with memory for as many tokens as the model's."""
    memory = holder.kv_memory * _token_bytes(holder) // _token_bytes(sizes.holder)
    return replace(holder, kv_memory=max(memory, _token_bytes(holder)))


def load_proposer(
    drafts: DraftFiles | None, sizes: Sizes, config: EngineConfig, progress: Progress | None, own: Weights | None = None
) -> Proposer | None:
    """What proposes drafts, beside the model with the `own` weights; None without speculation. Raises what loading a
    model raises."""
    if config.speculate is None:
        return None
    if drafts is None:
        return NgramProposer()
    holder, model = drafts.holder, drafts.files.model
    prepare_kernels(holder, sizes.dtype, (sizes.device, sizes.attention_device), progress)
    if config.speculate == MTP:
        if not isinstance(own, DecoderWeights):
            raise TypeError(f"the head stands beside a native model's weights, got {type(own).__name__}")
        with open_checkpoint(drafts.files.path) as checkpoint, torch.inference_mode():
            decoder: Decoder = MtpDecoder(mtp_config(model), load_mtp(model, checkpoint, own, drafts.packing))
    else:
        weights = drafts.files.weights(sizes.dtype, drafts.packing, sizes.device, WHOLE, progress)
        with torch.inference_mode():
            decoder = decoder_of(model, weights)
    port = LocalAttention(attention_worker(holder, sizes.own_threads, sizes.attention_device))
    worker = ModelWorker(decoder, holder, {LOCAL: port}, sizes.own_threads)
    heads = tuple(pool.config.layers[0].kv_heads for pool in pools(holder))
    draft_model = DraftModel(worker, heads, model.max_position_embeddings, drafts.vocabulary)
    return MtpProposer(draft_model, decoder) if isinstance(decoder, MtpDecoder) else DraftModelProposer(draft_model)


def _check_vocabulary(config: EngineConfig, own: Tokenizer, other: Tokenizer) -> None:
    """Refuse a draft model whose tokens are others."""
    name, allowed = f"{str(config.speculate)!r:.80}", "allowed is a model of the same vocabulary"
    if own.vocab_size != other.vocab_size:
        raise InvalidRequest(
            f"speculate is {name}, which has a vocabulary of {other.vocab_size} tokens, and the model one of "
            f"{own.vocab_size}; {allowed}"
        )
    ids = other.vocabulary
    for token, number in sorted(own.vocabulary.items(), key=lambda item: item[1]):
        if ids.get(token) != number:
            raise InvalidRequest(
                f"speculate is {name}, which has {other.token(number)!r:.40} for token {number} of its "
                f"{other.vocab_size}, and the model {token!r:.40}; {allowed}"
            )


def _token_bytes(holder: HolderConfig) -> int:
    """What a page of all layers and heads takes."""
    return sum(page_cost(p.config) * len(p.layers) * p.config.layers[0].kv_heads for p in pools(holder))
