"""Qwen2, Qwen2.5 and Qwen2-MoE: biases on q, k and v; the MoE has a gated shared expert."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Qwen2ForCausalLM, Qwen2MoeForCausalLM

from bridges.config_rules import MOE_LAYERS, NORM_TOPK
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=Qwen2ForCausalLM, target=GPTModel, model_type="qwen2")
class Qwen2Bridge(MegatronModelBridge):
    MEGATRON_DEFAULTS = {"add_qkv_bias": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())


@MegatronModelBridge.register_bridge(source=Qwen2MoeForCausalLM, target=GPTModel, model_type="qwen2_moe")
class Qwen2MoeBridge(MegatronModelBridge):
    CONFIG_RULES = (NORM_TOPK, MOE_LAYERS)
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, ("qkv_bias", "add_qkv_bias")]
    MEGATRON_DEFAULTS = {"moe_shared_expert_gate": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(
            *embeddings(), *attention(), *gated_mlp(), *moe(shared="shared_expert", shared_gate="shared_expert_gate")
        )
