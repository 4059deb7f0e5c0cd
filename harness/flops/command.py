"""What `goldengate flops` does: a provider from a row, a config.json or a folder, and the table by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import toy_models
from bridges import AutoBridge
from bridges.hf_pretrained import PreTrainedCausalLM, load_config, read_config
from harness.flops.fields import FlopsError
from harness.flops.run import Flops, Run

# Storage formats of weights: another number of bytes, the same operations.
NOT_COMPUTATION = ("quantization_config", "compression_config")


def load_provider(source: str) -> Any:
    """A finalized provider; errors as in `load_bridge`."""
    return load_bridge(source).to_megatron_provider(load_weights=False).finalize()


def load_bridge(source: str) -> AutoBridge:
    """The bridge of a row, a config.json or a folder. FlopsError for a source that is no row, no config.json and no folder with one; CheckpointError
    for a file that holds no JSON object, ConfigError for a config that no bridge knows."""
    if source in toy_models.rows():
        raw, path = toy_models.config_dict(source), Path(source)
    else:
        path = Path(source)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FlopsError(
                f"{source} is neither a row (goldengate families lists them) nor a config.json nor a folder with one"
            )
        raw = read_config(file)
    raw = {key: value for key, value in raw.items() if key not in NOT_COMPUTATION}
    folder = path if path.is_dir() and any(path.glob("*.safetensors")) else None
    return AutoBridge(PreTrainedCausalLM(load_config(raw, path, trusted=False), raw, folder))


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
