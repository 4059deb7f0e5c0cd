"""What a bridge says of config fields, by analogy: how the families that know a field say it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import bridges
from bridges.config_rules import Rule
from bridges.model_bridge import MegatronModelBridge
from harness.inspection.fields import Unknown
from toy_models.shrink import EPSILONS


@dataclass
class Words:
    """Parts of a table: pairs of CONFIG_MAPPING, {rule: module} of CONFIG_RULES, HF_FIXED; `open`: what no family knows.
    `like`: the family that each was taken from."""

    mapping: list[tuple[str, str]] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    open: list[Unknown] = field(default_factory=list)
    like: dict[str, str] = field(default_factory=dict)


def by_analogy(unknown: list[Unknown], near: list[str]) -> Words:
    """Return the words for fields that the common tables do not know, from the bridges of `near` architectures first."""
    order = [*near, *(name for name in MegatronModelBridge.supported() if name not in near)]
    families = [one.bridge for name in order if (one := MegatronModelBridge.registered([name]))]
    found = Words()
    for one in unknown:
        # A family that computes one value only may mean it by other words of its table: it is asked last.
        said = _by_name(one, found) or any(_from(family, one, found) for family in families)
        if not said and not any(_fixed(family, one, found) for family in families):
            found.open.append(one)
    return found


def _by_name(one: Unknown, found: Words) -> bool:
    """Take a field whose name says what it is: an epsilon, biases of q, k and v, a dropout that is off."""
    if one.name in EPSILONS:
        found.mapping.append((one.name, "layernorm_epsilon"))
    elif one.name in ("qkv_bias", "use_qkv_bias"):
        found.mapping.append((one.name, "add_qkv_bias"))
    elif re.search(r"dropout|pdrop", one.name) and not one.value:
        found.fixed[one.name] = one.value
    else:
        return False
    return True


def _from(family: type[MegatronModelBridge], one: Unknown, found: Words) -> bool:
    """Take a family's word for a field, if it has one that holds for this value."""
    common = MegatronModelBridge.CONFIG_MAPPING
    pair = next((pair for pair in family.CONFIG_MAPPING if pair[0] == one.name and pair not in common), None)
    rule = next((rule for rule in family.CONFIG_RULES if one.name in rule.hf and _home(rule)), None)
    if rule is not None:
        module, name = _home(rule) or ("", "")
        found.rules[name] = module
    elif pair is not None:
        found.mapping.append(pair)
    else:
        return False
    found.like[one.name] = family.__name__
    return True


def _fixed(family: type[MegatronModelBridge], one: Unknown, found: Words) -> bool:
    """Take a family's word that of a field only this value is built."""
    if one.name not in family.HF_FIXED or family.HF_FIXED[one.name] != one.value:
        return False
    found.fixed[one.name] = one.value
    found.like[one.name] = family.__name__
    return True


def _home(rule: Rule) -> tuple[str, str] | None:
    """(module, name) of a rule that has a name of its own."""
    return _named_rules().get(id(rule))


@cache
def _named_rules() -> dict[int, tuple[str, str]]:
    found: dict[int, tuple[str, str]] = {}
    for module in ("bridges.config_rules", *_modules("bridges.mechanisms")):
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, Rule) and name.isupper():
                found.setdefault(id(value), (module, name))
    return found


def _modules(package: str) -> list[str]:
    path = importlib.import_module(package).__path__
    return [f"{package}.{one.name}" for one in pkgutil.iter_modules(path)]


assert bridges  # the families are registered
