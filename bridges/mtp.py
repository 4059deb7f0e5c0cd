"""Multi-token prediction: mappings of the heads that follow the decoder, and the rule for how many there are.

Head k of Megatron's `mtp.layers` takes the hidden state of the head before it (of the decoder's final norm, the first) and
the embedding of the token k + 1 places on, and runs one decoder layer: its block is mapped like any decoder layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from bridges.blocks import HF_LAYER, MEGATRON_LAYER
from bridges.config_rules import Rule
from bridges.mapping import AutoMapping, Mapping, Part, SwappedColumnsMapping

# Megatron's name of a head's decoder layer, and the one it had before.
BLOCK_NAMES = ("mtp_model_layer", "transformer_layer")

DEPTH = Rule(
    ("num_nextn_predict_layers", "num_mtp_layers"),
    lambda c: {"mtp_num_layers": getattr(c, "num_nextn_predict_layers", None) or None},
    lambda p: {"num_nextn_predict_layers": p.mtp_num_layers or 0},
)


# DeepSeek and GLM publish every head with the embedding and the output matrix that it shares with the main model.
REPEATED_TENSORS = {
    "model.layers.*.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.*.shared_head.head.weight": "lm_head.weight",
}


def heads(
    layer: Sequence[Mapping],
    config,
    *,
    prefix: str = "model.layers.{n}",
    block: str = "",
    enorm: str = "enorm",
    hnorm: str = "hnorm",
    projection: str = "eh_proj",
    norm: str = "shared_head.norm",
    hidden_first: bool = False,
) -> list[Mapping]:
    """Mappings of the heads of `config` (none without one). `layer` maps a decoder layer.

    `prefix` is a head's Hugging Face name, where {k} counts heads from 0 and {n} from the number of decoder layers;
    `block` is what stands between it and the names of the head's decoder layer. `hidden_first`: on disk the projection's
    columns are [hidden state | embedding], in Megatron [embedding | hidden state].
    """
    mappings: list[Mapping] = []
    if config is None:
        return mappings
    for k in range(DEPTH.to_megatron(config)["mtp_num_layers"] or 0):
        m, hf = f"mtp.layers.{k}", prefix.format(k=k, n=config.num_hidden_layers + k)
        swap = SwappedColumnsMapping if hidden_first else AutoMapping
        mappings += [
            AutoMapping(f"{m}.enorm.weight", f"{hf}.{enorm}.weight"),
            AutoMapping(f"{m}.hnorm.weight", f"{hf}.{hnorm}.weight"),
            swap(f"{m}.eh_proj.weight", f"{hf}.{projection}.weight"),
            AutoMapping(f"{m}.final_layernorm.weight", f"{hf}.{norm}.weight"),
        ]
        for name in BLOCK_NAMES:
            mappings += [_moved(one, f"{m}.{name}", f"{hf}{block.format(k=k)}") for one in layer]
    return mappings


def _moved(mapping: Mapping, megatron: str, hf: str) -> Mapping:
    """The same declaration for one layer that stands elsewhere in both worlds."""
    moved = copy.copy(mapping)
    moved.megatron_param = mapping.megatron_param.replace(MEGATRON_LAYER, megatron, 1)
    moved.parts = tuple(Part(part.hf.replace(HF_LAYER, hf, 1), part.view) for part in mapping.parts)
    moved.__post_init__()
    return moved
