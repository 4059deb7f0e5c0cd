"""Hugging Face <-> Megatron-Core bridges: one declaration per parameter, any parallel layout."""

from bridges import families as _families  # registers every family
from bridges.auto_bridge import AutoBridge
from bridges.hf_pretrained import SAFE_REPOS, PreTrainedCausalLM, is_safe_repo
from bridges.layout import Layout, LayoutError
from bridges.mapping import (
    AutoMapping,
    ColumnParallelMapping,
    ConcatenatedGatedMLPMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    Mapping,
    MappingError,
    MegatronMappingRegistry,
    Part,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from bridges.model_bridge import ConfigError, MegatronModelBridge
from bridges.plan import PlanError
from bridges.provider import GPTModelProvider

__all__ = [name for name in dir() if name[0].isupper() or name == "is_safe_repo"]
