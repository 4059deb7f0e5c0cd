"""From a row's JSON file to a Hugging Face model and its inputs."""

import copy
import difflib
import json
from functools import cache
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from toy_models.randomise import generator, randomise

ROWS = Path(__file__).parent / "rows"
BATCH, SEQUENCE = 4, 24


def rows() -> list[str]:
    """Names of all rows, sorted, each base before its twins."""
    return sorted(path.name.removesuffix(".json") for path in ROWS.glob("*.json"))


def config_dict(row: str) -> dict:
    """The row's hub-style config.json; a twin (`_base` and overrides) comes merged. ValueError: unknown row."""
    if row not in rows():
        near = difflib.get_close_matches(row, rows(), cutoff=0.3) or rows()
        raise ValueError(f"no toy row {row!r}; nearest: {', '.join(near)}")
    return copy.deepcopy(_read(row))


@cache
def _read(row: str) -> dict:
    config = json.loads((ROWS / f"{row}.json").read_text())
    base = config.pop("_base", None)
    return {**_read(base), **config} if base else config


def hf_config(row: str) -> PretrainedConfig:
    """The row as a transformers config, read the way a hub config.json is (rope_theta, rope_scaling, ...)."""
    config = config_dict(row)
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def build(row: str, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "eager") -> PreTrainedModel:
    """The row's HF model in eval mode, every parameter and persistent buffer random.

    The random values are float32, rounded to `dtype` if that is narrower. Experts run HF's plain loop over experts
    and not a grouped kernel.
    """
    model = AutoModelForCausalLM.from_config(
        hf_config(row), dtype=dtype, attn_implementation=attn_implementation, experts_implementation="eager"
    )
    randomise(model)
    return model.eval()


def inputs(row: str) -> torch.Tensor:
    """Token ids, int64 [4, 24], the same in every run and different for every row.

    24 tokens are more than any row's sliding window. The padding id is left out: HF gives its embedding row no
    gradient, Megatron does.
    """
    config = config_dict(row)
    allowed = [i for i in range(config["vocab_size"]) if i != config.get("pad_token_id")]
    raw = generator(f"inputs of {row}").random_raw(BATCH * SEQUENCE)
    return torch.tensor([allowed[int(bits) % len(allowed)] for bits in raw]).view(BATCH, SEQUENCE)
