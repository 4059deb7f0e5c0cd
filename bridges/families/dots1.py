"""dots.llm1: grouped-query attention with q and k norms, sigmoid-routed experts."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Dots1ForCausalLM

from bridges.config_rules import FIRST_K_DENSE, GROUPS, SHARED_EXPERTS, SIGMOID_ROUTER
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=Dots1ForCausalLM, target=GPTModel, model_type="dots1")
class Dots1Bridge(MegatronModelBridge):
    CONFIG_RULES = (FIRST_K_DENSE, GROUPS, SHARED_EXPERTS)
    HF_FIXED = {"attention_bias": False, "norm_topk_prob": True, "scoring_func": "noaux_tc", "moe_layer_freq": 1}
    MEGATRON_DEFAULTS = {"qk_layernorm": True, **SIGMOID_ROUTER}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(
            *embeddings(),
            *attention(),
            *gated_mlp(),
            *moe(expert_bias="gate.e_score_correction_bias", shared="shared_experts"),
        )
