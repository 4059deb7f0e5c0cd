"""Weights from a counter-based generator: a tensor's values follow from (seed, name) and from nothing else.

HF's own initialisation sets norms to one and biases to zero, which hides a forgotten norm, a swapped bias
or a tensor loaded twice. Here every tensor is random and no two are alike. The bits come from Philox keyed
by a hash of the name, and become floats by a shift, one conversion, one multiplication and at most one
addition, all exactly specified by IEEE 754: the same values on every machine, in whatever order tensors are
made.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

# What a tensor is for, from its in-memory name and its number of dimensions. A name that no line covers is
# refused: a new family's A_log or conv1d needs a scale of its own, and a wrong one makes a toy blind to it.
_ROLES = [
    (r"(norm|\.ln_\w+)\.weight$", 1, "norm"),
    (r"(\.bias|e_score_correction_bias|\.dt_bias)$", 1, "bias"),
    (r"moe_statics\.e_score_correction_bias$", 2, "choice"),  # [1, E], added to softmax scores
    (r"\.A_log$", 1, "decay"),
    (r"(^|\.)(embed_tokens|word_embeddings)\.weight$", 2, "embedding"),
    (r"(_proj|_with_mqa|(^|\.)lm_head|(^|\.)gate|_gate)\.weight$", 2, "matrix"),
    (r"\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h|c_fc|router\.layer|router)\.weight$", 2, "matrix"),
    (r"\.in_proj_(qkvz|ba|qkv|z|b|a)\.weight$", 2, "matrix"),
    (r"\.conv1d\.weight$", 3, "matrix"),
    (r"\.experts\.(gate_up|down)_proj$", 3, "matrix"),  # fused experts [E, out, in]
]

SEED = 0
_BLOCK = 1 << 18  # values per step: 1 MiB of float32, so that all passes over a block stay in the cache


def kind_of(name: str, shape: Sequence[int]) -> str:
    """The role of a tensor, as `random_tensor` names it. ValueError for a name that no rule covers."""
    for pattern, ndim, kind in _ROLES:
        if len(shape) == ndim and re.search(pattern, name):
            return kind
    raise ValueError(
        f"{name} {list(shape)}: no rule says whether this is a matrix, a norm, a bias or an embedding; "
        "add one to _ROLES in toy_models/randomise.py"
    )


def generator(name: str, seed: int = SEED) -> np.random.Philox:
    """The bit generator of one name; its `random_raw` stream is part of numpy's compatibility promise."""
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "little"))


def random_tensor(name: str, shape: Sequence[int], *, seed: int = SEED, kind: str) -> np.ndarray:
    """float32 values of `shape`, uniform around their mean with no value exactly at it.

    kind "matrix": standard deviation 1.5 / sqrt(last dim), so that activations keep their size and attention
    and routers are far from uniform; "embedding": standard deviation 1; "norm": 1 +- 0.3; "bias": +- 0.6,
    as the softmax all but cancels a key bias and a smaller one hardly shows in the logits; "choice": +- 0.1, as a
    larger bias on softmax scores would choose the same experts for every token; "decay": -1 +- 1, the log of a rate at
    which a recurrence forgets some tokens and not all. ValueError for another kind.
    """
    blocks = list(random_blocks(name, shape, seed=seed, kind=kind))
    return np.concatenate(blocks).reshape(shape)


def random_blocks(name: str, shape: Sequence[int], *, seed: int = SEED, kind: str) -> Iterator[np.ndarray]:
    """The values of `random_tensor`, flattened, a block at a time, for tensors too large to hold."""
    matrix = 1.5 * math.sqrt(3 / shape[-1])
    scales = {"matrix": matrix, "embedding": math.sqrt(3), "norm": 0.3, "bias": 0.6, "choice": 0.1, "decay": 1}
    if kind not in scales:
        raise ValueError(f"{name}: kind {kind!r} is none of {', '.join(scales)}")
    scale = np.float32(scales[kind] / 2**24)
    bits = generator(name, seed)
    for start in range(0, math.prod(shape), _BLOCK):
        count = min(_BLOCK, math.prod(shape) - start)
        raw = bits.random_raw((count + 1) // 2).astype("<u8", copy=False)  # two values from each 64 bits
        # An odd integer between -2**24 and 2**24 fits a float32 exactly, is never zero and has mean zero.
        odd = (raw.view("<i4")[:count] >> 7) | 1
        block = odd.astype(np.float32)
        block *= scale
        if kind in ("norm", "decay"):
            block += np.float32(1 if kind == "norm" else -1)
        yield block


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by in-memory name, a tied tensor once under its first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def randomise(model: nn.Module, seed: int = SEED) -> None:
    """Overwrite every parameter and persistent buffer in place, keyed by its in-memory name.

    Non-persistent buffers (rotary frequencies) stay as they are: they follow from the config. ValueError,
    before anything is written, if the role of one tensor is unknown.
    """
    tensors = named_tensors(model)
    kinds = {name: kind_of(name, tensor.shape) for name, tensor in tensors.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(random_tensor(name, tensor.shape, seed=seed, kind=kinds[name])))


def weights_hash(weights: nn.Module | Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor by name; a model means its state dict, with that of its
    multi-token prediction heads."""
    tensors = dict(weights.state_dict() if isinstance(weights, nn.Module) else weights)
    if (heads := getattr(weights, "mtp", None)) is not None:
        tensors |= {f"mtp.{name}": tensor for name, tensor in heads.state_dict().items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
