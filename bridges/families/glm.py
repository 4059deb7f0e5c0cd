"""GLM-4: rope over half of each head with its channels interleaved, gate and up fused on disk; the 0414 models have norms
behind both blocks as well."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Glm4ForCausalLM, GlmForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.mechanisms.branches import post_norms
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=GlmForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="glm")
class GlmBridge(MegatronModelBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, ("attention_bias", "add_qkv_bias")]
    HF_DEFAULTS = {"partial_rotary_factor": 1.0}  # absent it would mean a half
    MEGATRON_DEFAULTS = {"rotary_interleaved": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp(gate_up="gate_up_proj"))


@MegatronModelBridge.register_bridge(
    source=Glm4ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="glm4"
)
class Glm4Bridge(GlmBridge):
    MEGATRON_DEFAULTS = {**GlmBridge.MEGATRON_DEFAULTS, "post_norm": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        behind = post_norms(attention="post_self_attn_layernorm", mlp="post_mlp_layernorm")
        return MegatronMappingRegistry(*super().mapping_registry(), *behind)
