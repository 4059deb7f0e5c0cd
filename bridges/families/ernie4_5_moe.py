"""ERNIE-4.5-MoE: interleaved rope, softmax routing with a bias that chooses and does not weigh, tied embeddings."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Ernie4_5_MoeForCausalLM

from bridges.config_rules import HF, Fields, Rule, shared_experts
from bridges.conversion.mapping import REPLICATED, MegatronMappingRegistry, ParamMapping, Part
from bridges.mechanisms.blocks import MEGATRON_LAYER, attention, embeddings, gated_mlp, moe
from bridges.model_bridge import MegatronModelBridge


def _layers_to_megatron(config: HF) -> Fields:
    first, last = config.moe_layer_start_index, config.moe_layer_end_index
    return {
        "moe_layer_freq": [
            int((i + 1) % config.moe_layer_interval == 0 and first <= i <= last)
            for i in range(config.num_hidden_layers)
        ]
    }


def _layers_to_hf(provider) -> Fields:
    """The start is the first layer with experts, which may be later than the one that the original names."""
    where = [i for i, experts in enumerate(provider.moe_layer_freq) if experts]
    interval = where[1] - where[0] if len(where) > 1 else where[0] + 1
    if where != [i for i in range(where[0], where[-1] + 1) if (i + 1) % interval == 0]:
        raise ValueError(
            f"layers with experts {where}: config.json can only say every n-th layer from a first to a last"
        )
    return {"moe_layer_start_index": where[0], "moe_layer_end_index": where[-1], "moe_layer_interval": interval}


LAYERS = Rule(
    ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _layers_to_megatron, _layers_to_hf
)


@MegatronModelBridge.register_bridge(source=Ernie4_5_MoeForCausalLM, target=GPTModel, model_type="ernie4_5_moe")
class Ernie45MoeBridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *(p for p in MegatronModelBridge.CONFIG_MAPPING if p[0] not in ("num_experts", "num_experts_per_tok")),
        ("moe_num_experts", "num_moe_experts"),
        ("moe_k", "moe_router_topk"),
    ]
    CONFIG_RULES = (LAYERS, shared_experts("moe_num_shared_experts"))
    # The probabilities of the chosen experts are renormalised, which is softmax over their logits; the lower limit of
    # the divisor is below what their sum can be.
    HF_FIXED = {"use_bias": False, "moe_norm_min": 1e-12, "moe_use_aux_free": True}
    MEGATRON_DEFAULTS = {
        "rotary_interleaved": True,
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    }

    def mapping_registry(self) -> MegatronMappingRegistry:
        bias = Part("model.layers.*.mlp.moe_statics.e_score_correction_bias", "u e -> ; u e ;")
        return MegatronMappingRegistry(
            *embeddings(),
            *attention(),
            *gated_mlp(),
            *moe(shared="shared_experts"),
            ParamMapping(f"{MEGATRON_LAYER}.mlp.router.expert_bias", (bias,), sharding=REPLICATED),
        )
