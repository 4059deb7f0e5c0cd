"""Multi-token prediction: mappings of the heads that follow the decoder, and the rule for how many there are.

Head k of Megatron's `mtp.layers` takes the hidden state of the head before it (of the decoder's final norm, the first) and
the embedding of the token k + 1 places on, and runs one decoder layer: its block is mapped like any decoder layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from bridges.config_rules import Rule
from bridges.conversion.mapping import AutoMapping, ParamMapping, Part, SwappedColumnsMapping
from bridges.mechanisms.blocks import HF_LAYER, MEGATRON_LAYER

# Megatron's name of a head's decoder layer, and the one it had before.
BLOCK_NAMES = ("mtp_model_layer", "transformer_layer")


def depth_rule(*names: str) -> Rule:
    """How many heads there are, said by the first of these config fields; 0, null and absent mean none."""
    return Rule(
        names,
        lambda c: {"mtp_num_layers": getattr(c, names[0], None) or None},
        lambda p: {names[0]: p.mtp_num_layers or 0},
        unread=True,
    )


DEPTH = depth_rule("num_nextn_predict_layers", "num_mtp_layers")


def depth_on_disk(hf_pretrained, pattern: str) -> int | None:
    """How many heads a checkpoint has, where no config field says it; `pattern` with its one * is a tensor of each."""
    if hf_pretrained.path is None:
        return None
    before, _, after = pattern.partition("*")
    names = hf_pretrained.checkpoint.tensors
    return sum(name.startswith(before) and name.endswith(after) for name in names) or None


# DeepSeek and GLM publish every head with the embedding and the output matrix that it shares with the main model.
REPEATED_TENSORS = {
    "model.layers.*.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.*.shared_head.head.weight": "lm_head.weight",
}


# Qwen3-Next and Qwen3.5: one head, beside the model.
QWEN_NAMES = {
    "prefix": "mtp",
    "block": ".layers.{k}",
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "projection": "fc",
    "norm": "norm",
    "depth": 1,
}


def heads(
    layer: Sequence[ParamMapping],
    config,
    *,
    prefix: str = "model.layers.{n}",
    block: str = "",
    enorm: str = "enorm",
    hnorm: str = "hnorm",
    projection: str = "eh_proj",
    norm: str = "shared_head.norm",
    hidden_first: bool = False,
    hf_layer: str = HF_LAYER,
    depth: int | None = None,
) -> list[ParamMapping]:
    """Mappings of the heads of `config` (none without one), or of `depth` heads. `layer` maps a decoder layer, which is
    `hf_layer` on disk.

    `prefix` is a head's Hugging Face name, where {k} counts heads from 0 and {n} from the number of decoder layers;
    `block` is what stands between it and the names of the head's decoder layer. `hidden_first`: on disk the projection's
    columns are [hidden state | embedding], in Megatron [embedding | hidden state].
    """
    mappings: list[ParamMapping] = []
    for k in range(depth or DEPTH.to_megatron(config)["mtp_num_layers"] or 0):
        m, hf = f"mtp.layers.{k}", prefix.format(k=k, n=getattr(config, "num_hidden_layers", 0) + k)
        swap = SwappedColumnsMapping if hidden_first else AutoMapping
        mappings += [
            AutoMapping(f"{m}.enorm.weight", f"{hf}.{enorm}.weight"),
            AutoMapping(f"{m}.hnorm.weight", f"{hf}.{hnorm}.weight"),
            swap(f"{m}.eh_proj.weight", f"{hf}.{projection}.weight"),
            AutoMapping(f"{m}.final_layernorm.weight", f"{hf}.{norm}.weight"),
        ]
        for name in BLOCK_NAMES:
            mappings += [_moved(one, f"{m}.{name}", hf_layer, f"{hf}{block.format(k=k)}") for one in layer]
    return mappings


def _moved(mapping: ParamMapping, megatron: str, hf_layer: str, hf: str) -> ParamMapping:
    """The same declaration for one layer that stands elsewhere in both worlds."""
    moved = copy.copy(mapping)
    moved.megatron_param = mapping.megatron_param.replace(MEGATRON_LAYER, megatron, 1)
    moved.parts = tuple(Part(part.hf.replace(hf_layer, hf, 1), part.view) for part in mapping.parts)
    moved.__post_init__()
    return moved
