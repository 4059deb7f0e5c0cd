"""EXAONE 4: norms behind the blocks and none before, q and k norms; with windows, layers without one have no rope."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Exaone4ForCausalLM

from bridges.config_rules import NO_ROPE_WITHOUT_WINDOW, Fields, Rule
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.mechanisms.branches import post_norms
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge


def _pattern_to_hf(provider) -> Fields:
    """Local and global layers of one period, as letters. transformers wants layer_types beside them, also without windows."""
    if not provider.window_size:
        return {"sliding_window_pattern": None, "layer_types": ["full_attention"] * provider.num_layers}
    letters = "".join("GL"[windowed] for windowed in provider.window_attn_skip_freq or [1] * provider.num_layers)
    return {"sliding_window_pattern": letters[: (letters + "G").index("G") + 1]}


PATTERN = Rule(("sliding_window_pattern",), lambda c: {}, _pattern_to_hf)  # layer_types count, which say the same


@MegatronModelBridge.register_bridge(
    source=Exaone4ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="exaone4"
)
class Exaone4Bridge(MegatronModelBridge):
    CONFIG_RULES = (NO_ROPE_WITHOUT_WINDOW, PATTERN)
    MEGATRON_DEFAULTS = {"qk_layernorm": True, "pre_norm": False, "post_norm": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp(), *post_norms())
