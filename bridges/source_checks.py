"""What a checkpoint holds beside its weights, or says about them, checked against the model that its config makes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from bridges.checkpoints.reader import Checkpoint, CheckpointError
from bridges.conversion.mapping import EMBEDDING, OUTPUT, MappingError, MegatronMappingRegistry
from bridges.providers.rope import inverse_frequencies

_FREQUENCIES = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def rotary_tensors(names: Iterable[str]) -> set[str]:
    """Those that hold inverse rope frequencies, as Llama-2's and Kimi-K2's checkpoints do."""
    return {name for name in names if _FREQUENCIES.fullmatch(name)}


def check_rotary(source: Checkpoint, provider: Any, hf_config: Any) -> None:
    """Raise CheckpointError, naming all, for stored frequencies that are not those of the config, before or after its rope
    scaling: the weights were trained with others. The bound is the rounding of the dtype in which they are stored."""
    if not (names := sorted(rotary_tensors(source.tensors))):
        return
    dim = getattr(provider, "qk_pos_emb_head_dim", 0) if getattr(provider, "multi_latent_attention", False) else 0
    percent = 1.0 if dim else provider.rotary_percent
    dim = dim or provider.kv_channels or provider.hidden_size // provider.num_attention_heads
    found = dict(getattr(hf_config, "rope_parameters", None) or {})
    scaling = None if found.get("rope_type", "default") == "default" else found
    known = [
        inverse_frequencies(
            base=provider.rotary_base,
            dim=dim,
            scaling=kind,
            percent=percent,
            max_position_embeddings=provider.max_position_embeddings,
        )[0].double()
        for kind in ([None] if scaling is None else [None, scaling])
    ]
    wrong = [name for name in names if not any(_close(source.view(name), one) for one in known)]
    if wrong:
        stored = source.view(wrong[0]).double().flatten()
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{source.path}: {wrong[0]}{more} holds {len(stored)} rope frequencies down to {stored.min().item():.6g}; the "
            f"config's are {len(known[-1])} down to {known[-1].min().item():.6g} (rope_theta {provider.rotary_base:g}): correct "
            "the config's rope fields, or remove the tensors"
        )


def _close(stored: torch.Tensor, expected: torch.Tensor) -> bool:
    if not stored.is_floating_point() or stored.shape != expected.shape:
        return False
    precision = torch.finfo(stored.dtype)
    bound = 2 * max(precision.eps, torch.finfo(torch.float32).eps) * expected + precision.smallest_normal
    return bool(((stored.double() - expected).abs() <= bound).all())


def check_vocabulary(registry: MegatronMappingRegistry, source: Checkpoint, vocab_size: int) -> None:
    """Raise CheckpointError when embedding or head on disk have another number of rows than the vocabulary."""
    rows = {}
    for parameter in (EMBEDDING, OUTPUT):
        try:
            mapping, parts = registry.megatron_to_hf_lookup(parameter)
        except MappingError:
            continue
        info = source.tensors.get(parts[0].hf)
        if mapping.padded and len(parts) == 1 and info is not None and info.shape[0] != vocab_size:
            rows[parts[0].hf] = info.shape[0]
    if rows:
        says = " and ".join(f"{name} has {count} rows" for name, count in rows.items())
        count = next(iter(rows.values()))
        raise CheckpointError(
            f"{source.path}: vocab_size is {vocab_size}, but {says}: set vocab_size to {count} in config.json (rows for new "
            "tokens are made with transformers' resize_token_embeddings)"
        )


def check_mtp(source: Checkpoint, provider: Any, registry: MegatronMappingRegistry) -> None:
    """Raise CheckpointError when the model has layers of multi-token prediction and the checkpoint not one tensor of theirs,
    as transformers saves it: it drops them and keeps their number."""
    depth = getattr(provider, "mtp_num_layers", None) or 0
    own = re.compile(r"mtp\.layers\.\d+\.(enorm|hnorm|eh_proj)\.weight")
    names = [part.hf for one in registry.mappings if own.fullmatch(one.megatron_param) for part in one.parts]
    if depth and names and not any(name in source.tensors for name in names):
        raise CheckpointError(
            f"{source.path}: config.json says {depth} layers of multi-token prediction, and the checkpoint has no tensor of "
            "them (transformers drops them when it saves): set the number (num_nextn_predict_layers, "
            "mtp_num_hidden_layers) to 0 in config.json, or provider.mtp_num_layers = None before finalize()"
        )
