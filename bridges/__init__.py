"""Hugging Face <-> Megatron-Core bridges: one declaration per parameter, any parallel layout."""

import logging as _logging
import warnings as _warnings

with _warnings.catch_warnings():
    # On import Megatron lists the accelerators this machine lacks; that is no news to somebody on a laptop.
    _warnings.simplefilter("ignore")
    _logging.getLogger("torch.utils.cpp_extension").setLevel(_logging.ERROR)
    from bridges import families as _families  # noqa: F401 - registers every family

from bridges.auto_bridge import AutoBridge
from bridges.checkpoints.reader import CheckpointError
from bridges.conversion.mapping import (
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
from bridges.conversion.plan import PlanError
from bridges.hf_pretrained import SAFE_REPOS, PreTrainedCausalLM, is_safe_repo
from bridges.layout import Layout, LayoutError
from bridges.mechanisms.gdn import GatedDeltaNetProvider
from bridges.mechanisms.mla import MLAModelProvider
from bridges.model_bridge import ConfigError, MegatronModelBridge
from bridges.providers.provider import GPTModelProvider

__all__ = [
    "SAFE_REPOS",
    "AutoBridge",
    "AutoMapping",
    "CheckpointError",
    "ColumnParallelMapping",
    "ConcatenatedGatedMLPMapping",
    "ConcatenatedQKVMapping",
    "ConfigError",
    "GPTModelProvider",
    "GatedDeltaNetProvider",
    "GatedMLPMapping",
    "Layout",
    "LayoutError",
    "MLAModelProvider",
    "Mapping",
    "MappingError",
    "MegatronMappingRegistry",
    "MegatronModelBridge",
    "Part",
    "PlanError",
    "PreTrainedCausalLM",
    "QKVMapping",
    "ReplicatedMapping",
    "RowParallelMapping",
    "is_safe_repo",
]
