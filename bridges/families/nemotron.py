"""Nemotron-4 and Minitron: LayerNorm whose weight stores gamma - 1, squared ReLU without a gate, rope over a part of each head."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import NemotronForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, plain_mlp
from bridges.mechanisms.branches import ATTENTION_BIAS
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(
    source=NemotronForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="nemotron"
)
class NemotronBridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *MegatronModelBridge.CONFIG_MAPPING,
        ("norm_eps", "layernorm_epsilon"),
        ("mlp_bias", "mlp_bias"),
    ]
    CONFIG_RULES = (ATTENTION_BIAS,)
    HF_DEFAULTS = {"partial_rotary_factor": 1.0}  # absent it would mean a half
    MEGATRON_DEFAULTS = {
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "gated_linear_unit": False,
    }

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *plain_mlp())
