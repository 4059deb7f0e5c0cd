"""What `goldengate inspect` finds out about a model from its files: what it is, what fits, what nobody knows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from bridges import AutoBridge, MegatronModelBridge, PreTrainedCausalLM
from bridges.checkpoints.reader import Checkpoint
from bridges.config_fields import STORAGE
from bridges.errors import GoldengateError
from harness.inspection import parameters, signs
from harness.inspection.fields import Fields, account
from harness.inspection.held import CONVENTION, Fit, Held, fits, missing_and_unknown, smallest, whole
from harness.inspection.parameters import Parameters
from harness.inspection.signs import Near
from harness.inspection.source import Source, open_source
from harness.mechanisms import mechanisms


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint folder holds: how many tensors and elements, {dtype: tensors}, and what does not fit the bridge."""

    tensors: int
    elements: int
    dtypes: dict[str, int]
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    compared: str = ""


@dataclass(frozen=True)
class Layouts:
    """The layouts of `gpus` GPUs with `memory` GiB each in which a training step's weights fit; `smallest` when none does."""

    gpus: int
    memory: float
    fits: list[Fit]
    smallest: Fit | None
    convention: str = CONVENTION


@dataclass
class Inspection:
    """All that could be found out; `notes` say what could not, and why."""

    target: str
    model_type: str
    architecture: str
    kind: str
    text_at: str
    towers: list[str]
    bridge: str = ""
    text_bridge: str = ""
    mechanisms: list[str] = field(default_factory=list)
    mechanisms_from: str = ""
    nearest: list[Near] = field(default_factory=list)
    tied: bool = False
    quantised: dict[str, Any] | None = None
    fields: Fields | None = None
    parameters: Parameters | None = None
    checkpoint: Tensors | None = None
    layouts: Layouts | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    given: str, *, trust_remote_code: bool | None = None, gpus: int | None = None, memory: float | None = None
) -> Inspection:
    """Return what there is to know about a row, a config.json, a checkpoint folder or a hub id in the cache.

    Raises InspectError and CheckpointError for what cannot be read at all; whatever else fails becomes a note.
    """
    source = open_source(given, trust_remote_code)
    found = Inspection(
        given,
        str(source.raw.get("model_type") or ""),
        source.architecture,
        source.kind,
        source.text_at,
        source.towers,
        tied=_tied(source),
        quantised=_quantised(source),
    )
    registration = MegatronModelBridge.registered(source.raw.get("architectures"), found.model_type)
    if source.refusal and registration:
        found.notes.append(source.refusal)
    found.bridge = registration.bridge.__name__ if registration else ""
    if not registration:
        text = MegatronModelBridge.registered(None, source.text.get("model_type")) if source.text_at else None
        found.text_bridge = text.bridge.__name__ if text else ""
    found.fields = account(source, registration.bridge if registration else None)
    model = _try(found, "transformers' class", lambda: parameters.build(source))
    auto = _bridge(source, found) if registration and source.config is not None else None
    _mechanisms(found, source, auto, model)
    held = _held(found, source, auto, needed=bool(gpus) or model is None or "MTP" in found.mechanisms)
    if model is not None:
        found.parameters = parameters.count(model, source.text, held.sizes if held else {})
    elif held:
        found.parameters = parameters.by_part(held.sizes, source.text, "Megatron's model, as the bridge makes it")
    _checkpoint(found, source, auto, held)
    if gpus and memory and held:
        good = fits(held, gpus, memory)
        found.layouts = Layouts(gpus, memory, good, None if good else smallest(held, gpus))
    elif gpus:
        found.notes.append("layouts: which fit can be told of a model with a bridge only")
    return found


def _try(found: Inspection, what: str, work: Any) -> Any:
    """What `work` gives, or None and a note: code of others meets configs here that nobody ever ran."""
    try:
        return work()
    except Exception as error:
        text = " ".join(str(error).split())
        found.notes.append(
            f"{what}: {text if isinstance(error, GoldengateError) else f'{type(error).__name__}: {text}'}"
        )
        return None


def _bridge(source: Source, found: Inspection) -> AutoBridge | None:
    config: Any = source.config
    return _try(found, "bridge", lambda: AutoBridge(PreTrainedCausalLM(config, source.raw)))


def _mechanisms(found: Inspection, source: Source, auto: AutoBridge | None, model: Any) -> None:
    if auto is not None:
        read = _try(found, "provider", lambda: mechanisms(auto.to_megatron_provider(load_weights=False)))
        if read is not None:
            found.mechanisms, found.mechanisms_from = read, f"the provider of {found.bridge}"
            return
    found.mechanisms = signs.read(signs.of_class(source.text, model))
    by = f" and the tensors of transformers' {type(model).__name__}" if model is not None else ""
    found.mechanisms_from = f"fields of config.json{by}"
    if not found.bridge:
        found.nearest = signs.nearest(found.mechanisms)


def _held(found: Inspection, source: Source, auto: AutoBridge | None, *, needed: bool) -> Held | None:
    folder = _weights(source)
    if auto is None or not (needed or folder):
        return None
    checkpoint = _try(found, "checkpoint", lambda: Checkpoint.open(folder)) if folder else None
    return _try(found, "Megatron's model", lambda: whole(auto, checkpoint))


def _weights(source: Source) -> Path | None:
    return source.folder if source.folder and any(source.folder.glob("*.safetensors")) else None


def _checkpoint(found: Inspection, source: Source, auto: AutoBridge | None, held: Held | None) -> None:
    folder = _weights(source)
    if folder is None or (opened := _try(found, "checkpoint", lambda: Checkpoint.open(folder))) is None:
        return
    infos = opened.tensors.values()
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    found.checkpoint = Tensors(len(infos), sum(prod(info.shape) for info in infos), dict(dtypes))
    if auto is not None and held is not None:
        missing, unknown = missing_and_unknown(held, opened.tensors, auto.ignored_tensors(opened))
        repeated = auto.repeated_tensors(opened, held.provider, held.registry)
        unknown = [name for name in unknown if name not in repeated]
        found.checkpoint = replace(found.checkpoint, missing=missing, unknown=unknown, compared=found.bridge)


def _tied(source: Source) -> bool:
    for fields in (source.text, source.raw):
        if "tie_word_embeddings" in fields:
            return bool(fields["tie_word_embeddings"])
    text = source.config.get_text_config() if source.config is not None else None
    return bool(getattr(text, "tie_word_embeddings", False))


def _quantised(source: Source) -> dict[str, Any] | None:
    """{method, and the fields that say how}; None for plain weights."""
    for name in STORAGE:
        for fields in (source.raw, source.text):
            if isinstance(stored := fields.get(name), dict):
                method = (
                    stored.get("quant_method") or stored.get("quant_algo") or stored.get("format") or "unknown method"
                )
                plain = {k: v for k, v in stored.items() if isinstance(v, str | int | float | bool)}
                return {"method": method, **plain}
    return None
