"""Sarvam-105B: DeepSeek-V3's layers under other config fields. transformers does not have it; the fields are those of
sarvamai's configuration_sarvam_moe.SarvamMLAConfig."""

from megatron.core.models.gpt.gpt_model import GPTModel

from bridges.config_rules import FIRST_K_DENSE, GROUPS, SIGMOID_ROUTER, shared_experts
from bridges.families.bailing import FIXED, ROUTING, SHARED_WIDTH
from bridges.families.deepseek import LatentMoeBridge
from bridges.mechanisms import mla
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(
    source="SarvamMLAForCausalLM", target=GPTModel, provider=mla.MLAModelProvider, model_type="sarvam_mla"
)
class SarvamMlaBridge(LatentMoeBridge):
    CONFIG_MAPPING = [
        p for p in LatentMoeBridge.CONFIG_MAPPING if p[0] not in ("num_local_experts", "n_routed_experts")
    ]
    CONFIG_RULES = (
        mla.rope("deepseek_yarn", plain=False),
        mla.HEADS,
        mla.Q_LORA,
        FIRST_K_DENSE,
        GROUPS,
        shared_experts("num_shared_experts"),
        SHARED_WIDTH,
    )
    HF_FIXED = FIXED | {"use_qk_norm": True}  # the norm of the latent
    HF_INERT = frozenset({"q_head_dim", "head_dim"})  # sums of the other head dims
    HF_FIELDS = frozenset(
        {hf for hf, _ in CONFIG_MAPPING}
        - {"shared_expert_intermediate_size", "initializer_range", "num_key_value_heads"}
        | ROUTING
        | {"rope_theta", "hidden_act"}
    )
    MEGATRON_DEFAULTS = LatentMoeBridge.MEGATRON_DEFAULTS | SIGMOID_ROUTER
