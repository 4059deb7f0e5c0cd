"""DeepSeek-V2, V2-Lite and V3, and what is built like V3: Moonlight, Kimi-K2."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from bridges.config_rules import FIRST_K_DENSE, GROUPS, SHARED_EXPERTS, SIGMOID_ROUTER, TOPK_METHOD
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms import mla, mtp
from bridges.mechanisms.blocks import embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge

BIAS = "gate.e_score_correction_bias"


class LatentMoeBridge(MegatronModelBridge):
    """What both have in common."""

    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, *mla.CONFIG_MAPPING]
    CONFIG_RULES = (*mla.RULES, FIRST_K_DENSE, SHARED_EXPERTS, mtp.DEPTH)
    HF_FIXED = {
        "attention_bias": False,
        "mlp_bias": False,
        "rope_interleave": True,
        "ep_size": 1,
        "moe_layer_freq": 1,
    }
    REPEATED_TENSORS = mtp.REPEATED_TENSORS
    # transformers gives the norms of both latents this epsilon, whatever rms_norm_eps says.
    MEGATRON_DEFAULTS = {"latent_norm_epsilon": 1e-6}

    def mapping_registry(self) -> MegatronMappingRegistry:
        layer = [*mla.attention(), *gated_mlp(), *moe(expert_bias=BIAS, shared="shared_experts")]
        return MegatronMappingRegistry(*embeddings(), *layer, *mtp.heads(layer, self.hf_config))


@MegatronModelBridge.register_bridge(
    source=DeepseekV3ForCausalLM,
    target=GPTModel,
    provider=mla.MLAModelProvider,
    model_type="deepseek_v3",
    aliases=("kimi_k2",),
)
class DeepseekV3Bridge(LatentMoeBridge):
    CONFIG_RULES = (*LatentMoeBridge.CONFIG_RULES, GROUPS)
    HF_FIXED = LatentMoeBridge.HF_FIXED | {
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    MEGATRON_DEFAULTS = LatentMoeBridge.MEGATRON_DEFAULTS | SIGMOID_ROUTER


@MegatronModelBridge.register_bridge(
    source=DeepseekV2ForCausalLM, target=GPTModel, provider=mla.MLAModelProvider, model_type="deepseek_v2"
)
class DeepseekV2Bridge(LatentMoeBridge):
    CONFIG_RULES = (*LatentMoeBridge.CONFIG_RULES, TOPK_METHOD)
    # Neither published models nor transformers renormalise the chosen probabilities.
    HF_FIXED = LatentMoeBridge.HF_FIXED | {"norm_topk_prob": False, "scoring_func": "softmax"}
    MEGATRON_DEFAULTS = LatentMoeBridge.MEGATRON_DEFAULTS | {"moe_router_pre_softmax": True}
