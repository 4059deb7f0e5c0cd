"""GLM-4.5 (grouped-query attention, partial rope, q and k norms in the large one) and GLM-4.7-Flash (latent attention)."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Glm4MoeForCausalLM, Glm4MoeLiteForCausalLM

from bridges.config_rules import FIRST_K_DENSE, GROUPS, MLP_LAYER_TYPES, SHARED_EXPERTS, SIGMOID_ROUTER
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.families.deepseek import BIAS, DeepseekV3Bridge
from bridges.mechanisms import mla, mtp
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=Glm4MoeForCausalLM, target=GPTModel, model_type="glm4_moe")
class Glm4MoeBridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *MegatronModelBridge.CONFIG_MAPPING,
        ("attention_bias", "add_qkv_bias"),
        ("use_qk_norm", "qk_layernorm"),
    ]
    CONFIG_RULES = (FIRST_K_DENSE, GROUPS, SHARED_EXPERTS, mtp.DEPTH)
    HF_FIXED = {"norm_topk_prob": True, "moe_layer_freq": 1}
    HF_DEFAULTS = {"partial_rotary_factor": 1.0}  # absent it would mean a half
    REPEATED_TENSORS = mtp.REPEATED_TENSORS
    MEGATRON_DEFAULTS = SIGMOID_ROUTER

    def mapping_registry(self) -> MegatronMappingRegistry:
        layer = [*attention(), *gated_mlp(), *moe(expert_bias=BIAS, shared="shared_experts")]
        return MegatronMappingRegistry(*embeddings(), *layer, *mtp.heads(layer, self.hf_config))


@MegatronModelBridge.register_bridge(
    source=Glm4MoeLiteForCausalLM, target=GPTModel, provider=mla.MLAModelProvider, model_type="glm4_moe_lite"
)
class Glm4MoeLiteBridge(DeepseekV3Bridge):
    CONFIG_RULES = (*mla.RULES, MLP_LAYER_TYPES, GROUPS, SHARED_EXPERTS, mtp.DEPTH)
