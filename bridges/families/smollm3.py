"""SmolLM3: some layers have no rope."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import SmolLM3ForCausalLM

from bridges.config_rules import NO_ROPE_LAYERS
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=SmolLM3ForCausalLM, target=GPTModel, model_type="smollm3")
class SmolLM3Bridge(MegatronModelBridge):
    CONFIG_RULES = (NO_ROPE_LAYERS,)
    HF_FIXED = {"attention_bias": False, "mlp_bias": False}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())
