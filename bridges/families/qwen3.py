"""Qwen3 and Qwen3-MoE: a norm on each query and key head, no biases."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from bridges.config_rules import MOE_LAYERS, NORM_TOPK
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=Qwen3ForCausalLM, target=GPTModel, model_type="qwen3")
class Qwen3Bridge(MegatronModelBridge):
    HF_FIXED = {"attention_bias": False}
    MEGATRON_DEFAULTS = {"qk_layernorm": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())


@MegatronModelBridge.register_bridge(source=Qwen3MoeForCausalLM, target=GPTModel, model_type="qwen3_moe")
class Qwen3MoeBridge(MegatronModelBridge):
    CONFIG_RULES = (NORM_TOPK, MOE_LAYERS)
    HF_FIXED = {"attention_bias": False}
    MEGATRON_DEFAULTS = {"qk_layernorm": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp(), *moe())
