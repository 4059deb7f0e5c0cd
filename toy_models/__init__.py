"""Toy Hugging Face models: one hub-style `config.json` per row, the same weights on every machine.

- rows(): names of the rows
- config_dict(row): the row's config.json as a dict
- hf_config(row): the transformers config made from it
- build(row): the HF model with random, pairwise distinct weights, in eval mode
- inputs(row): token ids [4, 24]
- write(row, folder): a checkpoint folder with the published tensor names
- save(model, folder): the same for a model at hand, a row's with other weights, say
- write_config_checkpoint(...): the same for a dense config of real size, never held in memory
- random_tensor, randomise: the weight generator
- weights_hash(model): one hash over names, dtypes, shapes and bytes
"""

from toy_models.builder import build, config_dict, hf_config, inputs, rows
from toy_models.checkpoint import save, write, write_config_checkpoint
from toy_models.randomise import SEED, random_tensor, randomise, weights_hash

__all__ = [
    "SEED",
    "build",
    "config_dict",
    "hf_config",
    "inputs",
    "random_tensor",
    "randomise",
    "rows",
    "save",
    "weights_hash",
    "write",
    "write_config_checkpoint",
]
