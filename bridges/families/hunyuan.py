"""Hunyuan dense: q and k norms behind the rope, whose base may be stretched by a fixed alpha."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import HunYuanDenseV1ForCausalLM

from bridges.config_rules import Rule
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.mechanisms.branches import ATTENTION_BIAS
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge

QK_NORM = ("query_layernorm", "key_layernorm")

FACTOR = Rule(  # transformers wants one beside alpha, and does not read it
    ("rope_scaling",),
    lambda c: {},
    lambda p: {"rope_scaling": {"factor": 1.0, **p.rope_scaling}} if "alpha" in (p.rope_scaling or {}) else {},
)


@MegatronModelBridge.register_bridge(
    source=HunYuanDenseV1ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="hunyuan_v1_dense"
)
class HunyuanDenseBridge(MegatronModelBridge):
    CONFIG_RULES = (ATTENTION_BIAS, FACTOR)
    MEGATRON_DEFAULTS = {"qk_layernorm": True, "qk_norm_after_rope": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(qk_norm=QK_NORM), *gated_mlp())
