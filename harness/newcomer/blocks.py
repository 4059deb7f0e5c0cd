"""Which blocks a model's tensors are mapped by: read from their names and shapes, guessed from nothing."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.inspection.signs import ZERO_CENTRED

Shape = tuple[int, ...]
HOMES = {
    "embeddings": "bridges.mechanisms.blocks",
    "attention": "bridges.mechanisms.blocks",
    "gated_mlp": "bridges.mechanisms.blocks",
    "plain_mlp": "bridges.mechanisms.blocks",
    "moe": "bridges.mechanisms.blocks",
    "post_norms": "bridges.mechanisms.branches",
    "mla": "bridges.mechanisms",
    "DecoderProvider": "bridges.mechanisms.decoder",
    "SIGMOID_ROUTER": "bridges.config_rules",
}
FUSED_QKV = ("qkv_proj", "query_key_value", "W_pack", "wqkv")
PLAIN = (("up_proj", "down_proj"), ("c_fc", "c_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"))
ROUTERS = ("gate", "router", "router.layer", "gate.wg")
BIASES = (
    "gate.e_score_correction_bias",
    "gate.expert_bias",
    "e_score_correction_bias",
    "moe_statics.e_score_correction_bias",
)


@dataclass
class Blocks:
    """`calls`: what goes into the registry; `defaults`: provider fields that tensors or code say; `spread`: tables that are
    unpacked into them; `bias_rule`: does attention_bias mean q, k, v and the output projection alike?"""

    calls: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    spread: list[str] = field(default_factory=list)
    bias_rule: bool = False
    latent: bool = False

    @property
    def names(self) -> set[str]:
        """What has to be imported."""
        used = {call.split("(")[0].split(".")[0] for call in self.calls} | set(self.spread)
        return used | ({"mla"} if self.latent else set())


def read(tensors: Mapping[str, Shape], heads: int, code: str, norms: str) -> Blocks:
    """Return the blocks for a model's published tensors. `code`: the source of its Hugging Face module, `norms`: of its norms."""
    layer = {
        re.sub(r"\.\d+\.", ".*.", n.split(".", 3)[3]): s for n, s in tensors.items() if n.startswith("model.layers.")
    }
    found = Blocks(["embeddings()"])
    block = next(
        (
            name.split(".")[0]
            for name in layer
            if re.search(r"attn|attention", name.split(".")[0]) and "norm" not in name.split(".")[0]
        ),
        "self_attn",
    )
    _attention(found, layer, block, heads)
    _feed_forward(found, layer)
    _norms(found, layer, norms)
    if re.search(r"def rotate_half\(x\):[^#]*?\.\.\. *, *(0)?::2\]", code) and not found.latent:
        found.defaults["rotary_interleaved"] = True
    return found


def source_of(model: Any) -> str:
    """Return the source of the module that a model's class is in."""
    return inspect.getsource(sys.modules[type(model).__module__])


def latent_epsilon(model: Any) -> float | None:
    """Return the epsilon of the norms of latents, which code may give them whatever the config says."""
    norms = (module for name, module in model.named_modules() if name.endswith("kv_a_layernorm"))
    return next((getattr(norm, "variance_epsilon", None) for norm in norms), None)


def _call(name: str, **arguments: Any) -> str:
    """A call with the arguments that are not the block's own defaults."""
    import bridges.mechanisms.blocks as blocks
    import bridges.mechanisms.branches as branches

    own = inspect.signature(getattr(blocks, name, None) or getattr(branches, name)).parameters
    said = {k: v for k, v in arguments.items() if own[k].default != v}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in said.items())})".replace("'", '"')


def _attention(found: Blocks, layer: Mapping[str, Shape], block: str, heads: int) -> None:
    if f"{block}.kv_a_proj_with_mqa.weight" in layer:
        found.latent = True
        found.calls.append("mla.attention()")
        return
    own = {name.removeprefix(f"{block}."): shape for name, shape in layer.items() if name.startswith(f"{block}.")}
    qkv = next((name for name in FUSED_QKV if f"{name}.weight" in own), None)
    norms = sorted(
        (n.removesuffix(".weight") for n in own if re.search(r"^(q|k|query|key)_?\w*norm\w*\.weight$", n)), reverse=True
    )
    arguments: dict[str, Any] = {"block": block, "qkv": qkv}
    if len(norms) == 2:
        arguments["qk_norm"] = tuple(norms)
        found.defaults["qk_layernorm"] = True
        width = own[f"{norms[0]}.weight"][-1]
        rows = own["q_proj.weight"][0] if "q_proj.weight" in own else 0
        if rows == width != rows // heads:
            found.defaults["whole_qk_norm"] = True
    output = next((n for n in ("o_proj", "dense", "out_proj", "c_proj", "wo") if f"{n}.weight" in own), "o_proj")
    found.calls.append(_call("attention", **arguments, output=output))
    if f"{qkv or 'q_proj'}.bias" in own:
        if f"{output}.bias" not in own:
            found.defaults["add_qkv_bias"] = True
        elif any(re.search(r"(up|down|c_fc|fc1)\w*\.bias$", name) for name in layer):
            found.defaults["add_bias_linear"] = True
        else:
            found.bias_rule = True


def _feed_forward(found: Blocks, layer: Mapping[str, Shape]) -> None:
    behind = "post_feedforward_layernorm" in " ".join(layer)
    norm = (
        "pre_feedforward_layernorm"
        if any(n.startswith("pre_feedforward") for n in layer)
        else "post_attention_layernorm"
    )
    if "mlp.gate_up_proj.weight" in layer:
        found.calls.append(_call("gated_mlp", norm=norm, gate_up="gate_up_proj"))
    elif "mlp.gate_proj.weight" in layer:
        found.calls.append(_call("gated_mlp", norm=norm))
    elif plain := next((pair for pair in PLAIN if f"mlp.{pair[0]}.weight" in layer), None):
        found.calls.append(_call("plain_mlp", norm=norm, names=plain))
        found.defaults["gated_linear_unit"] = False
    if experts := next((re.match(r"(.+)\.experts\.\*\.", name) for name in layer if ".experts.*." in name), None):
        _moe(found, layer, experts[1], norm)
    if behind:
        found.calls.append("post_norms()")
        found.defaults["post_norm"] = True
    elif "post_self_attn_layernorm.weight" in layer:
        found.calls.append(_call("post_norms", attention="post_self_attn_layernorm", mlp="post_mlp_layernorm"))
        found.defaults["post_norm"] = True


def _moe(found: Blocks, layer: Mapping[str, Shape], block: str, norm: str) -> None:
    forms = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
    names = next((form for form in forms if f"{block}.experts.*.{form[0]}.weight" in layer), forms[0])
    shared = next(
        (n for n in ("shared_experts", "shared_expert", "shared_mlp") if f"{block}.{n}.up_proj.weight" in layer), None
    )
    bias = next((name for name in BIASES if f"{block}.{name}" in layer), None)
    found.calls.append(
        _call(
            "moe",
            norm=norm,
            block=block,
            names=names,
            router=next((n for n in ROUTERS if f"{block}.{n}.weight" in layer), "gate"),
            expert_bias=bias,
            shared=shared,
            shared_gate=next((n for n in ("shared_expert_gate",) if f"{block}.{n}.weight" in layer), None),
        )
    )
    if bias:
        found.spread.append("SIGMOID_ROUTER")
    if shared and f"{block}.shared_expert_gate.weight" in layer:
        found.defaults["moe_shared_expert_gate"] = True


def _norms(found: Blocks, layer: Mapping[str, Shape], code: str) -> None:
    if ZERO_CENTRED.search(code):
        found.defaults["layernorm_zero_centered_gamma"] = True
    if any(name.endswith("input_layernorm.bias") for name in layer):
        found.defaults["normalization"] = "LayerNorm"
    names = {name.split(".")[0] for name in layer if "norm" in name.split(".")[0]}
    if "input_layernorm" not in names and found.defaults.get("post_norm"):
        found.defaults["pre_norm"] = False
    if names == {"input_layernorm"}:
        found.defaults |= {"parallel_blocks": True, "shared_norm": True}
