"""What people ask to have verified: a row of ours, or a model of theirs, for which a toy is made on the spot.

A config.json, a checkpoint folder or a hub id becomes a row without a file: its config is shrunk (toy_models.shrink), its
weights are random, and its reference is computed by Hugging Face at once instead of being kept as a golden.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toy_models
from bridges import AutoBridge, GoldengateError, MegatronModelBridge, PreTrainedCausalLM
from bridges.hf_pretrained import PublishedConfig, load_config
from harness.flops.command import load_bridge
from toy_models.shrink import MTP_DEPTH, SIZES, unshrunk

Given = str | Path | Mapping[str, Any]


class TargetError(GoldengateError, ValueError):
    """A target that is nothing that could be verified, or of which no toy can be made: the message says what is missing."""


@dataclass(frozen=True)
class Target:
    """A row, and for a stranger's model (`toy` is its row file) the words that the report has for it."""

    row: str
    toy: dict[str, Any] | None = None
    source: str = ""

    def __str__(self) -> str:
        if self.toy is None:
            return self.row
        fields = {key: value for key, value in self.toy.items() if not key.startswith("_")}
        return f"{self.row}: a toy of {self.source}, live reference: {json.dumps(fields)}"


def resolve(
    given: Given, *, bridge: type[MegatronModelBridge] | None = None, trust_remote_code: bool | None = None
) -> Target:
    """Return what a row's name, a config (a dict, or the path of its file), a checkpoint folder or a hub id stands for.

    Raises TargetError, and what AutoBridge raises for a config that no bridge can account for.
    """
    if isinstance(given, str) and given in toy_models.rows():
        return Target(given)
    try:
        if isinstance(given, Mapping):
            raw = dict(given)
            auto = AutoBridge(PreTrainedCausalLM(load_config(raw, Path("config.json"), trusted=False), raw), bridge)
            source, name = "a config", str(raw.get("model_type") or "config")
        else:
            auto = load_bridge(str(given), trust_remote_code)
            raw, source = auto.hf_pretrained.raw, str(given)
            path = Path(given)
            name = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    except ValueError as error:
        if isinstance(given, str) and "neither a row" in str(error):
            toy_models.config_dict(given) if "/" not in given and "." not in given else None  # names the nearest rows
        raise
    assert raw is not None
    return Target(_name(name), toy_file(raw, auto, source), source)


def _name(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "config"
    return f"{name}-toy" if name in toy_models.rows() or toy_models.is_guest(name) else name


def toy_file(raw: Mapping[str, Any], auto: AutoBridge, source: str) -> dict[str, Any]:
    """Return the row file of a toy of this config: shrunk, with what the family's own rows say of the reference."""
    registration = type(auto._model_bridge).registration
    assert registration is not None
    try:
        toy = toy_models.shrink({**_from_the_class(raw, auto.hf_pretrained.config), **raw})
    except toy_models.ShrinkError as error:
        raise TargetError(f"{source}: no toy of it can be made: {error}") from None
    if sizes := unshrunk(toy):
        raise TargetError(
            f"{source}: no toy of it can be made: {', '.join(f'{name} = {toy[name]}' for name in sizes)} may be sizes "
            "that toy_models/shrink.py does not know"
        )
    toy.setdefault("architectures", [registration.architecture])
    kind = type(auto.hf_pretrained.config)
    if kind is not PublishedConfig and kind.model_type:  # a text model may carry that of the model it was cut out of
        toy["model_type"] = kind.model_type
    toy.setdefault("model_type", registration.model_type)
    toy.setdefault("dtype" if "dtype" in toy else "torch_dtype", "float32")
    family = _family(registration.architecture)
    own = {k: v for k, v in family.items() if k.startswith("_") and k not in ("_base", "_inputs_seed")}
    if any(name in raw or name in family for name in MTP_DEPTH):  # else only a checkpoint's tensors say how deep
        depth = max((toy.get(name) or 0) for name in MTP_DEPTH)
        spec = own.pop("_mtp", None)
        if depth and spec is None:
            raise TargetError(f"{source}: no row of {registration.architecture} says how its MTP layers are computed")
        if depth and spec:
            own["_mtp"] = {**spec, "layers": depth}
    return {**toy, **own}


def _from_the_class(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Sizes that the config leaves to its class: the class's own default would not fit a toy."""
    stated = {name: value for name, value in config.to_dict().items() if name not in type(config).attribute_map}
    return {name: stated[name] for name in SIZES if name not in raw and isinstance(stated.get(name), int)}


def _family(architecture: str) -> dict[str, Any]:
    """The file of the first row of an architecture; empty when it has none."""
    files = (toy_models.row_file(row) for row in toy_models.rows())
    return next((file for file in files if architecture in file.get("architectures", ())), {})


@contextmanager
def as_rows(targets: Sequence[Target]) -> Iterator[list[str]]:
    """Let the toys of strangers count as rows while the context lasts; yields the names of all rows, each once."""
    with toy_models.guests({target.row: target.toy for target in targets if target.toy is not None}):
        yield list(dict.fromkeys(target.row for target in targets))


def save_row(target: Target, folder: Path, golden: bytes) -> None:
    """Keep a toy below `folder` as a row with its golden: rows/NAME.json and goldens/NAME.safetensors."""
    for name in ("rows", "goldens"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "rows" / f"{target.row}.json").write_text(json.dumps(target.toy, indent=2) + "\n")
    (folder / "goldens" / f"{target.row}.safetensors").write_bytes(golden)
