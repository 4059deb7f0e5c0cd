"""When logits differ: which module is the first whose output differs from Hugging Face's, and what usually causes that."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from harness.reference.compare import relative_rms

CAUSES = {
    "embedding": "vocabulary rows shifted or padded, tied or scaled embedding",
    "self_attention": "q/k/v order or head grouping, q/k norm, biases, rope base or scaling, window, softmax scale, the norm "
    "before attention or its epsilon",
    "mlp": "gate/up order, activation, expert order or orientation, router (normalisation, bias, groups, scaling), shared "
    "expert or its gate, the norm before the block",
    "output": "final norm or its epsilon, output head (tied?), vocabulary order",
}
BLOCKS = {
    "self_attention": ("self_attn", "self_attention", "attention", "linear_attn", "mixer"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe"),
}


def hf_layers(model: Any) -> Any:
    """Return the decoder layers of a Hugging Face model, whatever their list is called and whatever the decoder is inside."""
    decoder = model.get_decoder() or model.base_model
    return next(module for module in decoder.children() if isinstance(module, torch.nn.ModuleList))


def hf_activations(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"embedding", "layers.3.self_attention", "layers.3.mlp", ...: output [batch, sequence, hidden]} of a HF model."""
    found: dict[str, torch.Tensor] = {}
    layers = hf_layers(model)
    named: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        for block, names in BLOCKS.items():
            for name in names:
                if hasattr(layer, name):
                    named[f"layers.{i}.{block}"] = getattr(layer, name)

    def hook(name):
        def save(module, args, output):
            # A copy: Falcon adds to this very tensor what attention gave.
            found[name] = (output[0] if isinstance(output, tuple) else output).detach().clone().view(*ids.shape, -1)

        return save

    def embedded(module, args):  # what the first layer is given: some models scale the embedding after it is looked up
        found["embedding"] = args[0].detach()

    handles = [module.register_forward_hook(hook(name)) for name, module in named.items()]
    handles.append(layers[0].register_forward_pre_hook(embedded))
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def first_difference(expected: dict[str, torch.Tensor], actual: dict[str, np.ndarray], limit: float) -> str:
    """One line: the first module, in the order of computation, that is off by more than `limit` (relative RMS)."""
    compared = 0
    for name in sorted(expected, key=_order):
        if name not in actual:
            continue
        compared += 1
        value = relative_rms(torch.from_numpy(actual[name]), expected[name])
        if not value <= limit:
            kind = name.rpartition(".")[2]
            return f"first to differ: {name} (relative RMS {value:.2g}); look at: {CAUSES[kind]}"
    if not compared:
        return "no module's output could be compared"
    return f"all {compared} blocks agree, the output does not; look at: {CAUSES['output']}"


def _order(name: str) -> tuple[int, int]:
    match = re.match(r"layers\.(\d+)\.(\w+)", name)
    return (int(match[1]), list(BLOCKS).index(match[2])) if match else (-1, 0)
