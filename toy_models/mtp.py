"""Multi-token prediction heads of a row: transformers' own MtpModel beside the main model.

A row that has them says so in `_mtp`:

    "_mtp": {"layers": 1,
             "names": {"enorm": "model.layers.{n}.enorm", ..., "mtp_block": "model.layers.{n}"},
             "copies": {"model.layers.{n}.embed_tokens.weight": "model.embed_tokens.weight"},
             "hidden_first": false, "fused_experts": false}

`names` gives the published prefix of each of MtpModel's modules, `copies` the tensors that published checkpoints repeat,
`hidden_first` the order of eh_proj's two halves (false: [embedding, hidden state]), `fused_experts` whether all experts
are one tensor on disk. {k} counts heads from 0, {n} from the
number of decoder layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from toy_models.randomise import kind_of, random_tensor

SHARED = ("embed_tokens.", "shared_head.", "rotary_emb.")  # the main model's own


def make(spec: dict[str, Any], model: PreTrainedModel) -> MtpModel:
    """The heads of a main model, every parameter random and keyed by its name. They share its embedding and its head."""
    main = copy.copy(model)  # MtpModel reads what it needs from the main model's config
    config: Any = copy.deepcopy(model.config)
    main.config = config
    config.num_mtp_layers = spec["layers"]
    config.mtp_hidden_states_first = spec.get("hidden_first", False)
    if getattr(config, "layer_types", None) is not None:
        config.mtp_layer_types = ["full_attention"] * spec["layers"]
    if getattr(config, "mlp_layer_types", None) is not None:
        config.mtp_mlp_layer_types = config.mlp_layer_types[-1:] * spec["layers"]
    heads: Any = MtpModel(main, spec["layers"])
    heads = heads.to(model.dtype).eval()
    with torch.no_grad():
        for name, tensor in parameters(heads).items():
            values = random_tensor(f"mtp.{name}", tensor.shape, kind=kind_of(name, tensor.shape))
            tensor.copy_(torch.from_numpy(values))
    return heads


def parameters(heads: MtpModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers that are the heads' own, by MtpModel's names."""
    return {n: t for n, t in heads.state_dict(keep_vars=True).items() if not n.startswith(SHARED)}


def placed(spec: dict[str, Any], tensors: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The heads' tensors (`parameters`) where the checkpoint has them, experts still fused."""
    out = {}
    for name, parameter in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(.+)", name)
        assert match, f"{name}: not a name of MtpModel's"
        prefix = spec["names"][match[2]].format(k=int(match[1]), n=num_layers + int(match[1]))
        out[f"{prefix}.{match[3]}"] = parameter.detach()
    return out


def published(
    spec: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    num_layers: int,
    main: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The heads' tensors (`parameters`) under their names on disk, as views, so that the same names serve writing and
    reading.

    `main` holds the main model's tensors by published name, for the copies; without it these are empty.
    """
    out: dict[str, torch.Tensor] = {}
    for name, tensor in placed(spec, tensors, num_layers).items():
        experts, _, kind = name.rpartition(".")
        by_one = experts.endswith(".experts") and not spec.get("fused_experts", False)
        for e, one in enumerate(tensor if by_one else ()):
            if kind == "gate_up_proj":
                out[f"{experts}.{e}.gate_proj.weight"], out[f"{experts}.{e}.up_proj.weight"] = one.chunk(2)
            else:
                out[f"{experts}.{e}.{kind}.weight"] = one
        if not by_one:
            out[name] = tensor
    for name, source in spec.get("copies", {}).items():
        for k in range(spec["layers"]):
            out[name.format(k=k, n=num_layers + k)] = main[source].detach() if main else torch.empty(0)
    return out


def load(spec: dict[str, Any], model: PreTrainedModel, folder: Path) -> MtpModel:
    """The heads with the weights of a checkpoint folder. KeyError for a tensor that it does not have."""
    heads = make(spec, model)
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    own = published({**spec, "copies": {}}, parameters(heads), model.config.num_hidden_layers)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
    return heads


def logits(heads: MtpModel, model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits [batch, sequence - k, vocab] of head k = 1, 2, ...: position i has seen the tokens up to i + k, which are
    those of `ids`, and predicts token i + k + 1."""
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
    positions = torch.arange(ids.shape[1])[None].expand(ids.shape)
    found = []
    for k in range(1, heads.num_mtp_layers + 1):
        hidden = heads.forward_layer(k - 1, hidden[:, :-1], positions[:, k:], None, input_ids=ids[:, k:])
        found.append(heads._project_to_logits(hidden))
    return found
