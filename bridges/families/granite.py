"""Granite: factors on embeddings, attention scores, what blocks add, and logits; the MoE keeps all experts in two tensors."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import GraniteForCausalLM, GraniteMoeForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, fused_experts, gated_mlp, moe
from bridges.mechanisms.branches import ATTENTION_BIAS
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge

MULTIPLIERS = [
    ("embedding_multiplier", "embedding_multiplier"),
    ("residual_multiplier", "residual_multiplier"),
    ("attention_multiplier", "softmax_scale"),
    ("logits_scaling", "logits_divisor"),
]


@MegatronModelBridge.register_bridge(
    source=GraniteForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="granite"
)
class GraniteBridge(MegatronModelBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, *MULTIPLIERS, ("mlp_bias", "mlp_bias")]
    CONFIG_RULES = (ATTENTION_BIAS,)

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())


@MegatronModelBridge.register_bridge(
    source=GraniteMoeForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="granitemoe"
)
class GraniteMoeBridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *MegatronModelBridge.CONFIG_MAPPING,
        *MULTIPLIERS,
        ("intermediate_size", "moe_ffn_hidden_size"),
    ]
    CONFIG_RULES = (ATTENTION_BIAS,)
    MEGATRON_DEFAULTS = {"moe_router_pre_softmax": False}

    def mapping_registry(self) -> MegatronMappingRegistry:
        block = "block_sparse_moe"
        experts = fused_experts(gate_up=f"{block}.input_linear.weight", down=f"{block}.output_linear.weight")
        return MegatronMappingRegistry(*embeddings(), *attention(), *experts, *moe(block=block, router="router.layer"))
