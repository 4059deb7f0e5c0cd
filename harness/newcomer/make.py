"""What `goldengate new` does: a bridge table and a toy row as far as files say, and what a person must still say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import toy_models
from bridges import AutoBridge, GPTModelProvider, MegatronModelBridge, PreTrainedCausalLM
from bridges.errors import GoldengateError
from bridges.hf_pretrained import load_config
from harness import plugins
from harness.inspection import parameters, signs
from harness.inspection.fields import account
from harness.inspection.held import missing_and_unknown, whole
from harness.inspection.source import Source, open_source
from harness.newcomer import blocks, words
from harness.newcomer.text import table
from harness.plan import _by_class
from harness.targets import _from_the_class

# What fields and tensors say all of.
SAID = {
    "MoE",
    "dense",
    "tied",
    "MLA",
    "shared expert",
    "sigmoid router",
    "expert bias",
    "expert groups",
    "square experts",
}
SAID |= {"q/k norm", "attention bias", "zero-centred norm", "layer norm", "sliding window", "partial rotary"}


class NewError(GoldengateError, ValueError):
    """A family that cannot be begun: there is one already, or the config cannot be read; the message says what to do."""


@dataclass
class Begun:
    """The files that were written, the family that is nearest, and in `open` what a person must still say."""

    bridge_file: Path
    row_file: Path
    nearest: str
    open: list[str] = field(default_factory=list)


def begin(
    family: str, given: str, bridge_folder: Path, row_folder: Path, trust_remote_code: bool | None = None
) -> Begun:
    """Write FAMILY.py and FAMILY.json for the model of a config.json, a checkpoint folder or a hub id, and try them.

    Raises NewError for a family that is there already, an architecture that has a bridge, and a model that transformers has
    no class for; ShrinkError for a config of which no toy can be made.
    """
    if not family.isidentifier():
        raise NewError(f"{family!r} is no name for a family: letters, digits and _, as in qwen3_moe")
    begun = Begun(bridge_folder / f"{family}.py", row_folder / f"{family}.json", "")
    for file in (begun.bridge_file, begun.row_file):
        if file.exists():
            raise NewError(f"{file} is there already: choose another name, or remove it")
    if family in toy_models.rows():
        raise NewError(f"there is a row named {family} already: choose another name")
    source = open_source(given, trust_remote_code)
    if has := MegatronModelBridge.registered(source.raw.get("architectures"), source.raw.get("model_type")):
        raise NewError(f"{source.architecture or given} has a bridge: {has.bridge.__name__}; goldengate verify {given}")
    if source.config is None or (kind := parameters.class_of(source.config)) is None:
        raise NewError(
            f"transformers has no class for {source.architecture or given}, which is what a bridge is proven against: see "
            "docs/adding-a-model.md for a row's _reference and a bridge's HF_FIELDS"
        )
    if source.text_at or source.towers:
        raise NewError(
            f"{source.architecture} is a {source.kind}: its towers are no table; begin with its language model"
        )
    toy = _toy(source, kind)
    text = _table(family, source, kind, toy, begun)
    for folder in (bridge_folder, row_folder):
        folder.mkdir(parents=True, exist_ok=True)
    begun.bridge_file.write_text(text)
    begun.row_file.write_text(json.dumps(toy, indent=2) + "\n")
    _try(begun, toy)
    return begun


def _toy(source: Source, kind: type) -> dict[str, Any]:
    config: Any = source.config
    raw = {**_from_the_class(source.raw, config), **source.raw}
    toy = toy_models.shrink(raw)
    toy.setdefault("model_type", getattr(type(config), "model_type", None))
    toy.setdefault("model_type", type(config).model_type)
    toy.pop("dtype", None)
    return {**toy, "torch_dtype": "float32"}


def _table(family: str, source: Source, kind: Any, toy: dict[str, Any], begun: Begun) -> str:
    config: Any = load_config(toy, Path("config.json"), trusted=False)
    model = parameters.build(Source(family, toy, config, "", None, ""))
    seen = signs.of_class(source.text, model)
    near = signs.nearest(signs.read(seen))
    begun.nearest = f"{near[0].row} ({near[0].architecture})" if near else "none"
    begun.open += _mechanisms(signs.read(seen))
    published, _ = _by_class(config)
    found = blocks.read(published, config.num_attention_heads, blocks.source_of(model), seen.norms)
    if found.latent and (epsilon := blocks.latent_epsilon(model)) != config.rms_norm_eps:
        found.defaults["latent_norm_epsilon"] = epsilon
    said = words.by_analogy(
        account(Source(family, toy, config, "", None, ""), None).unknown, [n.architecture for n in near]
    )
    if not toy.get("moe_intermediate_size") and any(call.startswith("moe(") for call in found.calls):
        said.mapping.append(("intermediate_size", "moe_ffn_hidden_size"))
    if "add_qkv_bias" in found.defaults and said.rules.pop(
        "ATTENTION_BIAS", None
    ):  # tensors say that the output has none
        said.mapping.append(("attention_bias", "add_qkv_bias"))
    if found.bias_rule:
        said.rules["ATTENTION_BIAS"] = "bridges.mechanisms.branches"
        said.fixed.pop("attention_bias", None)
    begun.open += [f"field {one.name} = {one.value!r}, read at {one.read_at or 'its own code'}" for one in said.open]
    own = {one.name for one in fields(GPTModelProvider)}
    of_mechanisms = any(home.startswith("bridges.mechanisms") for home in said.rules.values())
    grows = {"rope dynamic", "rope longrope"} & set(signs.read(seen))  # tables that depend on the sequence's length
    plain = (
        not of_mechanisms
        and not grows
        and not set(found.defaults) - own
        and not {mega for _, mega in said.mapping} - own
    )
    provider = "mla.MLAModelProvider" if found.latent else "" if plain else "DecoderProvider"
    return table(family, kind.__name__, type(config).model_type, found, said, provider, begun)


def _mechanisms(names: list[str]) -> list[str]:
    """Those that neither config fields nor tensors say all of, and where they can be looked up."""
    have = {name: row for row, _, theirs in reversed(signs.families()) for name in theirs}
    looked = [name for name in names if name not in SAID and not name.startswith("rope ")]
    return [f"mechanism {n}: {f'as {have[n]} has it' if n in have else 'no family has it yet'}" for n in looked]


def _try(begun: Begun, toy: dict[str, Any]) -> None:
    """Import the bridge and build the toy's whole model from it: what does not fit is open."""
    module = plugins.load(str(begun.bridge_file))
    bridge = next(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__)
    try:
        config = load_config(toy, begun.row_file, trusted=False)
        auto = AutoBridge(PreTrainedCausalLM(config, toy), bridge)  # type: ignore[arg-type]
        published, in_memory = _by_class(config)
        held = whole(auto)
        missing, unknown = min(
            (missing_and_unknown(held, names, set()) for names in (published, in_memory)),
            key=lambda two: sum(map(len, two)),
        )
    except (GoldengateError, ValueError, AttributeError) as error:
        begun.open.append(f"the bridge does not build its toy yet: {' '.join(str(error).split())}")
        return
    begun.open += [f"tensor {name}: no mapping knows it" for name in _once(unknown)]
    begun.open += [f"tensor {name}: a mapping asks for it and the model has none" for name in _once(missing)]
    mapped = set(held.tensors().values())
    begun.open += [
        f"Megatron's {name}: no mapping makes it" for name in _once(n for n in held.shapes if n not in mapped)
    ]


def _once(names: Any) -> list[str]:
    """Names with their numbers as *, each once."""
    return list(
        dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", re.sub(r"(?<=weight)\d+$", "*", name)) for name in names)
    )
