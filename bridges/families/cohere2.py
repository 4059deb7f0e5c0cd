"""Command R7B and A: attention and feed-forward side by side behind one LayerNorm without a bias, interleaved rope on windowed
layers and none on the others."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Cohere2ForCausalLM

from bridges.config_rules import NO_ROPE_WITHOUT_WINDOW
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(
    source=Cohere2ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="cohere2"
)
class Cohere2Bridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *MegatronModelBridge.CONFIG_MAPPING,
        ("layer_norm_eps", "layernorm_epsilon"),
        ("logit_scale", "logits_multiplier"),
    ]
    CONFIG_RULES = (NO_ROPE_WITHOUT_WINDOW,)
    HF_FIXED = {"attention_bias": False}
    MEGATRON_DEFAULTS = {
        "normalization": "LayerNorm",
        "layernorm_bias": False,
        "parallel_blocks": True,
        "shared_norm": True,
        "rotary_interleaved": True,
    }

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())
