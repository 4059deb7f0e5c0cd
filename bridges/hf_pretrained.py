"""A Hugging Face model as a bridge sees it: its config, and its folder of tensors when there is one.

No model class is imported, and code that a checkpoint ships runs only with permission.
"""

from __future__ import annotations

import copy
import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING as HF_CONFIG_CLASSES
from transformers import AutoConfig, PreTrainedConfig

from bridges.checkpoints.companions import LEFT_BEHIND
from bridges.checkpoints.megatron import open_source
from bridges.checkpoints.reader import Checkpoint, CheckpointError, check_inside, check_regular
from bridges.config_fields import STORAGE
from bridges.model_bridge import ConfigError, MegatronModelBridge

MOST, MOST_LAYERS = 2**31 - 1, 2**16  # of any whole number in a config; of layers

# Organisations whose hub repositories may run their own code without being asked for each.
SAFE_REPOS: list[str] = [
    "deepseek-ai",
    "google",
    "llava-hf",
    "meta-llama",
    "mistralai",
    "moonshotai",
    "nvidia",
    "openai",
    "Qwen",
]


def is_safe_repo(hf_path: str | os.PathLike, trust_remote_code: bool | None = None) -> bool:
    """May code shipped with `hf_path` run? An explicit answer counts; else hub ids `org/model` of SAFE_REPOS.

    A local path says nothing about where its files are from, so it needs the explicit answer, whatever it looks like.
    """
    if trust_remote_code is not None:
        return trust_remote_code
    parts = str(hf_path).split("/")
    return not Path(hf_path).exists() and len(parts) == 2 and parts[0] in SAFE_REPOS and parts[1] != ""


class PublishedConfig(PreTrainedConfig):
    """A config.json as it stands, of a model that has a bridge and no config class; the rope fields are brought together
    as for every other model."""

    rope_parameters: dict | None = None


class PreTrainedCausalLM:
    """`config` (a transformers config), `raw` (config.json as it stands), `checkpoint` (opened when first asked for)."""

    def __init__(self, config: PreTrainedConfig, raw: dict[str, Any] | None = None, path: Path | None = None):
        self.config, self.raw, self.path = copy.deepcopy(config), raw, path
        # transformers 5 moved these into rope_parameters; bridges written for hub configs read them by name.
        for name, value in {**(raw or {}), **dict(getattr(config, "rope_parameters", None) or {})}.items():
            if name in ("rope_theta", "partial_rotary_factor") and not hasattr(config, name):
                setattr(self.config, name, value)

    @classmethod
    def open(
        cls, hf_path: str | os.PathLike, trust_remote_code: bool | None = None, *, weights: bool = True
    ) -> PreTrainedCausalLM:
        """From a local folder or a hub id (which the hub's cache must hold when HF_HUB_OFFLINE is set). Without `weights` the
        folder may lack them or hold them quantised, and of a hub's model they are not fetched.

        Raises ConfigError when the model needs code of its own and there is no permission to run it.
        """
        path = Path(hf_path)
        if not path.is_dir():
            path = _hub_folder(str(hf_path), weights)
        file = path / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no config.json: give a folder as save_pretrained writes it")
        check_inside(path, file.name)
        raw = read_config(file)
        has_weights = weights or (any(path.glob("*.safetensors")) and not any(raw.get(name) for name in STORAGE))
        config = load_config(raw, path, is_safe_repo(hf_path, trust_remote_code))
        return cls(config, raw, path if has_weights else None)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        if self.path is None:
            raise CheckpointError("this bridge was made from a config alone: it has no weights; give hf_path")
        if stored := next((stored for name in STORAGE if (stored := (self.raw or {}).get(name))), None):
            method = stored.get("quant_method") or stored.get("quant_algo") if isinstance(stored, dict) else stored
            raise CheckpointError(
                f"{self.path}: its weights are quantised ({method or 'unknown method'}), which is not built: provider, FLOPs "
                "and plan work from config.json alone; to import the weights give a folder of them in bf16 or fp32"
            )
        return open_source(self.path)


def read_config(file: Path) -> dict[str, Any]:
    """A config.json as it stands. CheckpointError when it is not one."""
    check_regular(file)
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return raw


def load_config(raw: dict[str, Any], path: Path, trusted: bool) -> PreTrainedConfig:
    """The config object of a config.json. For a model type that transformers does not have, a bridge that names it says how
    to read it. Else code that the checkpoint ships for it runs, only when `trusted`; without any it is a plain config."""
    check_sizes(raw, path)
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
        raise ConfigError(f"{path}: architectures is {named!r}: a list of class names is needed")
    try:
        _check_model_type(raw)
        if kind := _config_class(raw):
            return kind.from_dict(copy.deepcopy(raw))  # it writes into nested dicts
        if raw.get("auto_map"):
            if not trusted:
                MegatronModelBridge.find(raw)  # without a bridge, permission would not help
                raise ConfigError(
                    f"{path} ships its own code (auto_map) for model type {raw.get('model_type')!r} and may not run it "
                    "(trust_remote_code=False): pass trust_remote_code=True if you trust it"
                )
            _check_code_stays(raw["auto_map"], path.parent if path.suffix == ".json" else path)
            return AutoConfig.from_pretrained(path.parent if path.suffix == ".json" else path, trust_remote_code=True)
        return PreTrainedConfig.from_dict(copy.deepcopy(raw))
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # transformers' strict configs raise their own kinds
        file = path if path.suffix == ".json" else path / "config.json"
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error


def check_sizes(raw: dict[str, Any], path: Path, below: str = "") -> None:
    """ConfigError, naming all, for whole numbers that no model has: config classes make lists as long as they say."""
    wrong = []
    for name, value in raw.items():
        limit = MOST_LAYERS if re.search(r"layers?$", name) else MOST
        if isinstance(value, dict):
            check_sizes(value, path, f"{below}{name}.")
        elif type(value) is int and abs(value) > limit:
            wrong.append(f"{below}{name} is {value:.6g}, over {limit}")
    if wrong:
        raise ConfigError(f"{path}: {', '.join(wrong)}: no machine holds such a model")


def _check_model_type(raw: dict[str, Any]) -> None:
    """ConfigError for a model type that nobody knows beside an architecture whose model type transformers has: with a plain
    config the defaults of its class (1e-6 or 1e-5 for an epsilon) would be lost."""
    registration, model_type = MegatronModelBridge.registered(raw.get("architectures")), raw.get("model_type")
    if registration is None or registration.bridge.HF_FIELDS or raw.get("auto_map"):
        return
    known = registration.model_type
    if known in HF_CONFIG_CLASSES and model_type not in (known, *registration.aliases):
        if isinstance(model_type, str) and model_type in HF_CONFIG_CLASSES:
            return  # a text model under its vision-language model's type, say
        raise ConfigError(f"model_type {model_type!r} is not known; {raw['architectures'][0]} goes with {known!r}")


def _check_code_stays(auto_map: Any, folder: Path) -> None:
    """ConfigError for code elsewhere than in the folder that has permission: `other/repository--module.Class`, a path."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for name in [n for v in values for n in (v if isinstance(v, list | tuple) else [v]) if n is not None]:
        repository, _, place = name.rpartition("--") if isinstance(name, str) else ("", "", "")
        cached = {f"models--{repository.replace('/', '--')}"} & {p.name for p in folder.absolute().parents}
        if repository and not cached:
            raise ConfigError(
                f"{folder}: auto_map names code of {repository!r}, another repository: copy it into this one"
            )
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", place):
            raise ConfigError(f"{folder}: auto_map names {name!r}, which is no module.Class of the folder")
    for file in folder.glob("*.py"):
        check_inside(folder, file.name)


def _config_class(raw: dict[str, Any]) -> type[PreTrainedConfig] | None:
    """transformers' own, or that of a bridge's model type which this one is another name of; None: nobody knows.

    A text model may carry the model type of the vision-language model that it was cut out of; its architecture decides.
    """
    model_type = raw.get("model_type") or ""
    if _states_its_fields(raw):
        return PublishedConfig
    if model_type in HF_CONFIG_CLASSES:
        kind = HF_CONFIG_CLASSES[model_type]
        parts: Any = kind.sub_configs
        registration = MegatronModelBridge.registered(raw.get("architectures"))
        named = registration.model_type if registration else None
        return next((part for part in parts.values() if named and getattr(part, "model_type", None) == named), kind)
    registration = MegatronModelBridge.registered(raw.get("architectures"), model_type)
    if registration is None or not model_type or model_type not in (registration.model_type, *registration.aliases):
        return None
    known = registration.model_type
    return HF_CONFIG_CLASSES[known] if known and known in HF_CONFIG_CLASSES else PublishedConfig


def _states_its_fields(raw: dict[str, Any]) -> bool:
    """Has the config.json a bridge that states all fields itself (HF_FIELDS), since transformers did not have the model?
    transformers may gain it, under other field names and with defaults; the file and its bridge stay what they are."""
    registration = MegatronModelBridge.registered(raw.get("architectures"))
    if registration is None or not registration.bridge.HF_FIELDS:
        return False
    return raw.get("model_type") in (registration.model_type, *registration.aliases)


def _hub_folder(repo: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    files: Any = {"ignore_patterns": list(LEFT_BEHIND)} if weights else {"allow_patterns": ["config.json", "*.py"]}
    try:
        return Path(snapshot_download(repo, **files))
    except Exception as error:
        raise CheckpointError(
            f"{repo} is neither a folder nor a model that the hub (or its cache) gives: {str(error).splitlines()[0]}"
        ) from None
