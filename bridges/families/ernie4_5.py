"""ERNIE 4.5, the dense models: interleaved rope, tied embeddings."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Ernie4_5ForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=Ernie4_5ForCausalLM, target=GPTModel, model_type="ernie4_5")
class Ernie45Bridge(MegatronModelBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, ("use_bias", "add_bias_linear")]
    MEGATRON_DEFAULTS = {"rotary_interleaved": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())
