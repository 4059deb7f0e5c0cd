"""What `goldengate flops` does: a provider from a row, a config.json or a folder, and the table by part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toy_models
from bridges import AutoBridge
from bridges.errors import GoldengateError
from bridges.hf_pretrained import PreTrainedCausalLM, is_safe_repo, load_config, read_config
from harness.flops.fields import FlopsError
from harness.flops.model import flops as count
from harness.flops.run import Flops, Run


def load_provider(source: str, trust_remote_code: bool | None = None) -> Any:
    """A finalized provider; errors as in `load_bridge`."""
    return load_bridge(source, trust_remote_code).to_megatron_provider(load_weights=False).finalize()


def load_bridge(source: str, trust_remote_code: bool | None = None) -> AutoBridge:
    """The bridge of a row, a config.json, a folder with one, or a hub id, of which no weights are fetched. FlopsError for
    what is none of them; CheckpointError for a file that holds no JSON object, ConfigError for a config that no bridge
    knows."""
    path = Path(source)
    if source in toy_models.rows():
        raw = toy_models.config_dict(source)
        return AutoBridge(PreTrainedCausalLM(load_config(raw, path, trusted=False), raw))
    if path.is_file():
        raw = read_config(path)
        return AutoBridge(PreTrainedCausalLM(load_config(raw, path, is_safe_repo(path, trust_remote_code)), raw))
    if path.is_dir() or (source.count("/") == 1 and not source.startswith(("/", "."))):
        return AutoBridge(PreTrainedCausalLM.open(source, trust_remote_code, weights=False))
    raise FlopsError(
        f"{source} is neither a row (goldengate families lists them) nor a config.json, a folder with one or a hub id"
    )


@dataclass(frozen=True)
class Surveyed:
    """One config.json of a folder of them: its architecture, and its FLOPs or why there are none."""

    file: str
    architecture: str
    model_type: str
    flops: int | None
    unread: list[str]
    refusal: str


def is_collection(source: str) -> bool:
    """Is this a folder of config files under names of their own?"""
    path = Path(source)
    return path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.json"))


def survey(folder: str, trust_remote_code: bool | None = None, **run: Any) -> list[Surveyed]:
    """Every *.json of a folder: a provider and the FLOPs of `run` (see harness.flops.flops), or the refusal."""
    found = []
    for file in sorted(Path(folder).glob("*.json")):
        architecture, model_type, total, unread, refusal = "", "", None, [], ""
        try:
            raw = read_config(file)
            architecture, model_type = " ".join(raw.get("architectures") or []), str(raw.get("model_type"))
            bridge = load_bridge(str(file), trust_remote_code)
            pretrained = bridge.hf_pretrained
            _, unread = bridge._model_bridge.unread_fields(pretrained.config, pretrained.raw)
            total = count(bridge.to_megatron_provider(load_weights=False).finalize(), **run).total
        except (GoldengateError, ValueError) as error:
            refusal = str(error)
        found.append(Surveyed(file.name, architecture, model_type, total, unread, refusal))
    return found


def survey_table(found: list[Surveyed]) -> Any:
    """A rich table of a survey."""
    from rich.table import Table

    counted = sum(one.flops is not None for one in found)
    title = f"{counted} of {len(found)} configs have a provider; FLOPs of one forward and backward"
    lines = Table(title=title, title_justify="left", title_style="", box=None)
    for column in ("file", "architecture", "FLOPs", "not read, or why not"):
        lines.add_column(column, overflow="fold", justify="right" if column == "FLOPs" else "left")
    for one in found:
        total = "" if one.flops is None else human(one.flops)
        lines.add_row(one.file, one.architecture, total, one.refusal or ", ".join(one.unread))
    return lines


def describe(run: Run) -> str:
    """The convention in a sentence."""
    match run.convention, run.kernels:
        case "model", _:
            return "model: every query meets every key (or its whole window); nothing is halved for causality"
        case "causal", _:
            return "causal: half of full attention, windows exactly by position"
        case "hardware", "torch":
            return "hardware, torch kernels: what the CPU backend executes (whole scores, chunked gated delta rule)"
    return "hardware, fused kernels: what flash attention and chunked GPU kernels execute (scores again in backward)"


def human(flops: float) -> str:
    """Four digits and a unit: 49.03 G."""
    units = ["", "K", "M", "G", "T", "P", "E"]
    while abs(flops) >= 999.95 and len(units) > 1:
        flops /= 1000
        units.pop(0)
    return f"{flops:.4g} {units[0]}"


def table(counted: Flops) -> Any:
    """A rich table by part."""
    from rich.table import Table

    run = counted.run
    title = f"{describe(run)}\n{len(run.lengths)} sequences, {run.tokens:,} tokens; FLOPs of one forward and backward"
    lines = Table(title=title, title_justify="left", title_style="", box=None)
    lines.add_column("part", no_wrap=True)
    for column in ("layers", "forward", "backward", "total", "per token", "share"):
        lines.add_column(column, justify="right", no_wrap=True)

    def add(name: str, layers: str, forward: int, backward: int) -> None:
        total = forward + backward
        numbers = (forward, backward, total, total / run.tokens)
        lines.add_row(name, layers, *map(human, numbers), f"{total / counted.total:.2%}")

    for part in counted.by_part().values():
        add(part.name, part.place, part.forward, part.backward)
    add("total", "", counted.forward, counted.backward)
    return lines
