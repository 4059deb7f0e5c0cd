"""Mistral (with and without sliding window) and Mixtral."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MistralForCausalLM, MixtralForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=MistralForCausalLM, target=GPTModel, model_type="mistral")
class MistralBridge(MegatronModelBridge):
    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())


@MegatronModelBridge.register_bridge(source=MixtralForCausalLM, target=GPTModel, model_type="mixtral")
class MixtralBridge(MegatronModelBridge):
    # All layers have experts, and their width is what the config calls intermediate_size. Renormalised top-k
    # probabilities are softmax over the chosen logits.
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, ("intermediate_size", "moe_ffn_hidden_size")]
    MEGATRON_DEFAULTS = {"moe_router_pre_softmax": False}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(
            *embeddings(), *attention(), *moe(block="block_sparse_moe", names=("w1", "w3", "w2"))
        )
