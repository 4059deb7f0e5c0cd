"""Ministral: Mistral with a sliding window on some of its layers."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MinistralForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=MinistralForCausalLM, target=GPTModel, model_type="ministral")
class MinistralBridge(MegatronModelBridge):
    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())
