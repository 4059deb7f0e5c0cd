"""Qwen3-Next: gated delta net and gated attention by turns, experts with a gated shared one."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Qwen3NextForCausalLM

from bridges.config_rules import MOE_LAYERS, NORM_TOPK
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms import gdn, mtp
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge
from bridges.providers.provider import GPTModelProvider


@MegatronModelBridge.register_bridge(
    source=Qwen3NextForCausalLM, target=GPTModel, provider=gdn.GatedDeltaNetProvider, model_type="qwen3_next"
)
class Qwen3NextBridge(MegatronModelBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, *gdn.CONFIG_MAPPING]
    CONFIG_RULES = (gdn.LAYER_TYPES, NORM_TOPK, MOE_LAYERS)
    HF_FIXED = gdn.FIXED
    MEGATRON_DEFAULTS = {"moe_shared_expert_gate": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        layer = [
            *gdn.gated_attention(),
            *attention(),
            *gdn.linear_attention(gdn.packed_projections),
            *gated_mlp(),
            *moe(shared="shared_expert", shared_gate="shared_expert_gate"),
        ]
        return MegatronMappingRegistry(*embeddings(), *layer, *mtp.heads(layer, None, **mtp.QWEN_NAMES))

    def provider_bridge(self, hf_pretrained) -> GPTModelProvider:
        provider = super().provider_bridge(hf_pretrained)
        provider.mtp_num_layers = mtp.depth_on_disk(hf_pretrained, "mtp.layers.*.input_layernorm.weight")
        return provider
