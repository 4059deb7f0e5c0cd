"""Hugging Face <-> Megatron-Core bridges: one declaration per parameter, any parallel layout.

Names are imported when they are first asked for, so that what needs no Megatron (views, mappings, layouts, checkpoint
folders) is there at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridges.auto_bridge import AutoBridge
    from bridges.checkpoints.reader import CheckpointError
    from bridges.conversion.mapping import (
        AutoMapping,
        ColumnParallelMapping,
        ConcatenatedGatedMLPMapping,
        ConcatenatedQKVMapping,
        GatedMLPMapping,
        MappingError,
        MegatronMappingRegistry,
        ParamMapping,
        Part,
        QKVMapping,
        ReplicatedMapping,
        RowParallelMapping,
    )
    from bridges.conversion.mapping import ParamMapping as Mapping
    from bridges.conversion.plan import PlanError
    from bridges.errors import GoldengateError
    from bridges.hf_pretrained import SAFE_REPOS, PreTrainedCausalLM, is_safe_repo
    from bridges.layout import Layout, LayoutError
    from bridges.mechanisms.gdn import GatedDeltaNetProvider
    from bridges.mechanisms.mla import MLAModelProvider
    from bridges.model_bridge import ConfigError, MegatronModelBridge
    from bridges.providers.provider import GPTModelProvider

# Where each public name lives.
_HOMES = {
    "bridges.auto_bridge": ("AutoBridge",),
    "bridges.checkpoints.reader": ("CheckpointError",),
    "bridges.conversion.mapping": (
        "AutoMapping",
        "ColumnParallelMapping",
        "ConcatenatedGatedMLPMapping",
        "ConcatenatedQKVMapping",
        "GatedMLPMapping",
        "MappingError",
        "MegatronMappingRegistry",
        "ParamMapping",
        "Part",
        "QKVMapping",
        "ReplicatedMapping",
        "RowParallelMapping",
    ),
    "bridges.conversion.plan": ("PlanError",),
    "bridges.errors": ("GoldengateError",),
    "bridges.hf_pretrained": ("PreTrainedCausalLM", "SAFE_REPOS", "is_safe_repo"),
    "bridges.layout": ("Layout", "LayoutError"),
    "bridges.mechanisms.gdn": ("GatedDeltaNetProvider",),
    "bridges.mechanisms.mla": ("MLAModelProvider",),
    "bridges.families": ("MegatronModelBridge",),  # with every family registered
    "bridges.model_bridge": ("ConfigError",),
    "bridges.providers.provider": ("GPTModelProvider",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_FORMER_NAMES = {"Mapping": "ParamMapping"}

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
    "GoldengateError",
    "Layout",
    "LayoutError",
    "MLAModelProvider",
    "Mapping",
    "MappingError",
    "MegatronMappingRegistry",
    "MegatronModelBridge",
    "ParamMapping",
    "Part",
    "PlanError",
    "PreTrainedCausalLM",
    "QKVMapping",
    "ReplicatedMapping",
    "RowParallelMapping",
    "is_safe_repo",
]


def __getattr__(name: str) -> Any:
    original = _FORMER_NAMES.get(name, name)
    if original not in _HOME_OF:
        raise AttributeError(f"module 'bridges' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[original]), original)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
