"""The text of a bridge that `goldengate new` begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness.newcomer.blocks import HOMES, Blocks
from harness.newcomer.words import Words


def table(
    family: str, architecture: str, model_type: str, found: Blocks, said: Words, provider: str, begun: Any
) -> str:
    """Return a module with one bridge; what is open stands in its docstring."""
    return "\n".join(
        [
            _docstring(family, begun),
            "",
            *_imports(architecture, found, said, provider),
            "",
            "",
            "@MegatronModelBridge.register_bridge(",
            f'    source={architecture}, target=GPTModel, {f"provider={provider}, " if provider else ""}model_type="{model_type}"',
            ")",
            f"class {''.join(word.title() for word in family.split('_'))}Bridge(MegatronModelBridge):",
            *_body(found, said),
            "    def mapping_registry(self) -> MegatronMappingRegistry:",
            f"        return MegatronMappingRegistry({', '.join(f'*{call}' for call in found.calls)})",
            "",
        ]
    )


def _docstring(family: str, begun: Any) -> str:
    opened = "".join(f"\n- {line}" for line in begun.open)
    return f'"""{family}, begun by goldengate new; the nearest family is {begun.nearest}.' + (
        f'\n\nOpen:{opened}\n"""' if opened else '"""'
    )


def _imports(architecture: str, found: Blocks, said: Words, provider: str) -> Iterable[str]:
    names = found.names | ({"DecoderProvider"} if provider == "DecoderProvider" else set())
    homes: dict[str, set[str]] = {
        "bridges.conversion.mapping": {"MegatronMappingRegistry"},
        "bridges.model_bridge": {"MegatronModelBridge"},
    }
    for name in names:
        homes.setdefault(HOMES[name], set()).add(name)
    for name, module in said.rules.items():
        homes.setdefault(module, set()).add(name)
    yield "from megatron.core.models.gpt.gpt_model import GPTModel"
    yield f"from transformers import {architecture}"
    yield ""
    for home, imported in sorted(homes.items()):
        yield f"from {home} import {', '.join(sorted(imported))}"


def _body(found: Blocks, said: Words) -> Iterable[str]:
    bases = ["*MegatronModelBridge.CONFIG_MAPPING", *(["*mla.CONFIG_MAPPING"] if found.latent else [])]
    pairs = [f'("{hf}", "{megatron}")' for hf, megatron in dict.fromkeys(said.mapping)]
    if pairs or found.latent:
        yield f"    CONFIG_MAPPING = [{', '.join([*bases, *pairs])}]"
    rules = [*(["*mla.RULES"] if found.latent else []), *said.rules]
    if rules:
        yield f"    CONFIG_RULES = ({', '.join(rules)},)"
    if said.fixed:
        yield f"    HF_FIXED = {said.fixed!r}".replace("'", '"')
    defaults = [*(f"**{name}" for name in found.spread), *(f'"{k}": {v!r}' for k, v in found.defaults.items())]
    if defaults:
        yield f"    MEGATRON_DEFAULTS = {{{', '.join(defaults)}}}".replace("'", '"')
    yield ""
