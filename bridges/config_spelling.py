"""config.json of an export: what was trained, in the spelling that the source uses and in no other.

transformers reads several names for one thing (rope_theta and rope_scaling, or both in rope_parameters; torch_dtype or
dtype; and what a config class's attribute_map says). A bridge writes one of them; the source may have another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from bridges.config_rules import Rule
from bridges.model_bridge import ConfigError

Fields = dict[str, Any]

# Names of one field, the one that bridges write first.
SAME_FIELD = (
    ("torch_dtype", "dtype"),
    ("hidden_act", "hidden_activation"),
    ("num_experts", "num_local_experts", "n_routed_experts"),
)
ROPE = ("rope_theta", "partial_rotary_factor", "rope_scaling")
DENSE, KINDS = "first_k_dense_replace", "mlp_layer_types"


def check_spellings(raw: Mapping[str, Any], attribute_map: Mapping[str, str]) -> None:
    """Raise ConfigError, naming all, for fields that are there in two spellings with different values."""
    wrong = []
    for names in (*SAME_FIELD[:1], *SAME_FIELD[2:], *attribute_map.items()):
        said = {name: raw[name] for name in names if raw.get(name) is not None}
        if len({str(value).removeprefix("torch.") for value in said.values()}) > 1:
            wrong.append(said)
    parameters = raw.get("rope_parameters") or {}
    for name in ROPE[:2]:
        if parameters.get(name) is not None and raw.get(name) not in (None, parameters[name]):
            wrong.append({name: raw[name], f"rope_parameters.{name}": parameters[name]})
    kinds, dense = raw.get(KINDS), raw.get(DENSE)
    if isinstance(kinds, list) and isinstance(dense, int) and kinds != _kinds(dense, len(kinds)):
        wrong.append({DENSE: dense, KINDS: kinds})
    if wrong:
        pairs = "; ".join(" and ".join(f"{k} = {v!r}" for k, v in said.items()) for said in wrong)
        raise ConfigError(f"config.json contradicts itself: {pairs}: remove the wrong spelling")


def patched(
    raw: Fields,
    before: Fields,
    after: Fields,
    *,
    rules: Iterable[Rule] = (),
    attribute_map: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Fields:
    """The source's config.json `raw` with what changed between `before` and `after`, a bridge's own dicts for the source
    and for the model at hand. `dtype` is that of the exported tensors where it is not the source's."""
    out = copy.deepcopy(raw)
    changed = {k: v for k, v in after.items() if k not in before or v != before[k]}
    gone = [k for k in before if k not in after]
    for rule in rules:  # fields of one rule count together: the others may say otherwise in the source
        if any(name in changed or name in gone for name in rule.hf):
            changed |= {k: after[k] for k in rule.hf if k in after and (after[k] is not None or k in raw)}
    changed.pop("torch_dtype", None)  # of the model in Megatron's hands; what counts are the files' tensors
    if dtype is not None:
        changed["torch_dtype"] = str(dtype).removeprefix("torch.")
    _set_rope(out, after, {k for k in ROPE if k in changed or k in gone})
    groups = [*SAME_FIELD, *((real, alias) for alias, real in (attribute_map or {}).items())]
    done: set[str] = set()
    for name, value in changed.items():
        if name in ROPE or name in done:
            continue
        names = {name, *(n for group in groups if name in group for n in group)}
        done |= names
        _set(out, name, names, value)
    for name in gone:
        if name not in (*ROPE, "torch_dtype"):
            out.pop(name, None)
    return out


def _set(out: Fields, name: str, names: set[str], value: Any) -> None:
    """Write a value under those of `names` that are there; else under `name`."""
    if name == KINDS and DENSE in out and KINDS not in out and value == _kinds(value.count("dense"), len(value)):
        names, value = {DENSE}, value.count("dense")
    elif name == KINDS:
        out.pop(DENSE, None)
    elif name == DENSE and KINDS in out:
        kinds = _kinds(value, len(out[KINDS]))
        out[KINDS] = kinds
        names = {DENSE} if DENSE in out else set()
    for one in [n for n in names if n in out] or ([name] if names else []):
        out[one] = value


def _kinds(dense: int, layers: int) -> list[str]:
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def _set_rope(out: Fields, after: Fields, changed: set[str]) -> None:
    parameters = out.get("rope_parameters")
    if not changed:
        return
    if isinstance(parameters, dict) and any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError(
            f"rope_parameters has one entry per layer type ({', '.join(parameters)}), and {', '.join(sorted(changed))} "
            "changed: which layers' is not known; set it in the exported config.json"
        )
    for name in ROPE[:2]:
        if name in changed:
            outside = name in out or not isinstance(parameters, dict)
            if isinstance(parameters, dict) and (name in parameters or not outside):
                _put(parameters, name, after.get(name))
            if outside:
                _put(out, name, after.get(name))
    if "rope_scaling" in changed:
        scaling = after.get("rope_scaling")
        if isinstance(parameters, dict):
            kept = {k: v for k, v in parameters.items() if k in ROPE[:2]}
            out["rope_parameters"] = {**kept, **(_as_spelled(scaling, parameters) or {"rope_type": "default"})}
        if not isinstance(parameters, dict) or "rope_scaling" in out:
            out["rope_scaling"] = _as_spelled(scaling, out.get("rope_scaling"))


def _put(fields: Fields, name: str, value: Any) -> None:
    if value is None:
        fields.pop(name, None)
    else:
        fields[name] = value


def _as_spelled(scaling: Fields | None, source: Fields | None) -> Fields | None:
    """`type` was the old name of `rope_type`."""
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    rest = {k: v for k, v in scaling.items() if k not in ("type", "rope_type")}
    names = [name for name in ("rope_type", "type") if name in (source or {})] or ["rope_type"]
    return {**dict.fromkeys(names, kind), **rest}
