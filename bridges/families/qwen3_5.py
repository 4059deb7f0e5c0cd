"""The language models of Qwen3.5 and Qwen3.6, dense and with experts: like Qwen3-Next, with its projections unpacked.

Their tensors are named as in the published vision-language checkpoints, or without `language_model` as transformers names
a text model made from scratch; experts are published fused, and saved one by one.
"""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry, ParamMapping
from bridges.mechanisms import gdn, mtp
from bridges.mechanisms.blocks import attention, either, embeddings, fused_experts, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge


class Qwen3_5TextBridge(MegatronModelBridge):
    """What both have in common."""

    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, *gdn.CONFIG_MAPPING]
    CONFIG_RULES = (gdn.LAYER_TYPES, gdn.MROPE, mtp.depth_rule("mtp_num_hidden_layers"))
    HF_FIXED = gdn.FIXED | {
        "attn_output_gate": True,
        "mtp_use_dedicated_embeddings": False,
    }

    def mlp(self, layer: str) -> list[ParamMapping]:
        return gated_mlp(layer=layer)

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*either(*(self._under(model) for model in ("model.language_model", "model"))))

    def _under(self, model: str) -> list[ParamMapping]:
        layer = f"{model}.layers.*"
        mappings = [
            *gdn.gated_attention(layer=layer),
            *attention(layer=layer),
            *gdn.linear_attention(gdn.separate_projections, layer=layer),
            *self.mlp(layer),
        ]
        heads = mtp.heads(mappings, None, hf_layer=layer, **mtp.QWEN_NAMES)
        return [*embeddings(embed=f"{model}.embed_tokens", norm=f"{model}.norm"), *mappings, *heads]


@MegatronModelBridge.register_bridge(
    source=Qwen3_5ForCausalLM, target=GPTModel, provider=gdn.GatedDeltaNetProvider, model_type="qwen3_5_text"
)
class Qwen3_5Bridge(Qwen3_5TextBridge):
    pass


@MegatronModelBridge.register_bridge(
    source=Qwen3_5MoeForCausalLM, target=GPTModel, provider=gdn.GatedDeltaNetProvider, model_type="qwen3_5_moe_text"
)
class Qwen3_5MoeBridge(Qwen3_5TextBridge):
    HF_FIXED = Qwen3_5TextBridge.HF_FIXED | {"mlp_only_layers": []}
    MEGATRON_DEFAULTS = {"moe_shared_expert_gate": True}

    def mlp(self, layer: str) -> list[ParamMapping]:
        by_one = moe(layer=layer, shared="shared_expert", shared_gate="shared_expert_gate")
        return [*fused_experts(layer=layer), *by_one]
