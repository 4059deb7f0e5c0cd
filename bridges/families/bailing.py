"""Bailing V2 (Ling and Ring 2.0) and Sarvam-30B: grouped-query attention in one tensor, sigmoid-routed experts.

transformers has neither. Names and fields are those of inclusionAI's modeling_bailing_moe_v2 and sarvamai's
modeling_sarvam_moe; the computation is GLM-4.5's.
"""

from megatron.core.models.gpt.gpt_model import GPTModel

from bridges.config_rules import FIRST_K_DENSE, GROUPS, HF, SIGMOID_ROUTER, Fields, Rule, shared_experts
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge

# What both config.json files state beside the fields of CONFIG_MAPPING.
ROUTING = {"n_group", "topk_group", "num_shared_experts", "first_k_dense_replace"}
FIXED = {
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "num_nextn_predict_layers": 0,
}


def _shared_width(config: HF) -> Fields:
    width = getattr(config, "moe_shared_expert_intermediate_size", None)
    if width not in (None, config.moe_intermediate_size):
        raise ValueError(
            f"moe_shared_expert_intermediate_size = {width} is not built: only moe_intermediate_size "
            f"({config.moe_intermediate_size}), the width of a routed expert"
        )
    return {}


SHARED_WIDTH = Rule(("moe_shared_expert_intermediate_size",), _shared_width, lambda p: {})


@MegatronModelBridge.register_bridge(
    source="BailingMoeV2ForCausalLM", target=GPTModel, model_type="bailing_moe_v2", aliases=("bailing_moe",)
)
class BailingMoeV2Bridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *(p for p in MegatronModelBridge.CONFIG_MAPPING if p[0] not in ("num_local_experts", "n_routed_experts")),
        ("use_qkv_bias", "add_qkv_bias"),
        ("use_qk_norm", "qk_layernorm"),
    ]
    CONFIG_RULES = (FIRST_K_DENSE, GROUPS, shared_experts("num_shared_experts"), SHARED_WIDTH)
    HF_FIXED = FIXED | {"use_bias": False, "use_rmsnorm": True, "norm_head": False}
    HF_DEFAULTS = {"partial_rotary_factor": 1.0}  # absent it would mean a half
    HF_FIELDS = frozenset(
        {hf for hf, _ in CONFIG_MAPPING} - {"shared_expert_intermediate_size", "initializer_range"}
        | ROUTING
        | {"head_dim", "rope_theta", "partial_rotary_factor", "hidden_act"}
    )
    MEGATRON_DEFAULTS = SIGMOID_ROUTER

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(
            *embeddings(embed="model.word_embeddings"),
            *attention(
                block="attention", qkv="query_key_value", qk_norm=("query_layernorm", "key_layernorm"), output="dense"
            ),
            *gated_mlp(),
            *moe(expert_bias="gate.expert_bias", shared="shared_experts"),
        )


@MegatronModelBridge.register_bridge(source="SarvamMoEForCausalLM", target=GPTModel, model_type="sarvam_moe")
class SarvamMoeBridge(BailingMoeV2Bridge):
    HF_FIELDS = BailingMoeV2Bridge.HF_FIELDS - {"partial_rotary_factor"}
    HF_DEFAULTS = {}
