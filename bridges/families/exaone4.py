"""EXAONE 4: norms behind the blocks and none before, q and k norms; with windows, layers without one have no rope."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Exaone4ForCausalLM

from bridges.config_rules import NO_ROPE_WITHOUT_WINDOW, Rule
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.mechanisms.branches import post_norms
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge

LAYER_TYPES = Rule(  # transformers cannot do without them where there is no window
    (), lambda c: {}, lambda p: {} if p.window_size else {"layer_types": ["full_attention"] * p.num_layers}
)


@MegatronModelBridge.register_bridge(
    source=Exaone4ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="exaone4"
)
class Exaone4Bridge(MegatronModelBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, ("sliding_window_pattern", "window_pattern")]
    CONFIG_RULES = (NO_ROPE_WITHOUT_WINDOW, LAYER_TYPES)
    MEGATRON_DEFAULTS = {"qk_layernorm": True, "pre_norm": False, "post_norm": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp(), *post_norms())
