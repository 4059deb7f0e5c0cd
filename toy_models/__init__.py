"""Toy Hugging Face models: one hub-style `config.json` per row, the same weights on every machine.

- rows(): names of the rows
- config_dict(row): the row's config.json as a dict; row_file(row): with our own keys
- add_rows(folder), further_rows(): rows of somebody else's repository
- guests(files): a context in which further row files count
- shrink(config): a toy's config.json for a published one
- hf_config(row): the transformers config made from it
- reference_of(row): how transformers computes a model that it has no class for, else None
- reference_class(row): the name of the transformers class that is the row's truth
- golden_key(row): what the row's golden depends on
- build(row): the HF model with random, pairwise distinct weights, in eval mode
- inputs(row): token ids [4, 24]
- mtp: the multi-token prediction heads of rows that have them
- write(row, folder): a checkpoint folder with the published tensor names
- published(row, model), save(row, model, folder), load(row, folder): tensors under the published names
- write_config_checkpoint(...): the same for a dense config of real size, never held in memory
- random_tensor, randomise: the weight generator
- weights_hash(model): one hash over names, dtypes, shapes and bytes
"""

from toy_models import mtp
from toy_models.builder import (
    build,
    golden_key,
    hf_config,
    inputs,
    mtp_spec,
    reference_class,
    reference_of,
)
from toy_models.catalogue import add_rows, amend_guest, config_dict, further_rows, guests, is_guest, row_file, rows
from toy_models.checkpoint import load, published, save, write, write_config_checkpoint
from toy_models.randomise import SEED, random_tensor, randomise, weights_hash
from toy_models.shrink import ShrinkError, shrink

__all__ = [
    "SEED",
    "ShrinkError",
    "add_rows",
    "amend_guest",
    "build",
    "config_dict",
    "further_rows",
    "golden_key",
    "guests",
    "hf_config",
    "inputs",
    "is_guest",
    "load",
    "mtp",
    "mtp_spec",
    "published",
    "random_tensor",
    "randomise",
    "reference_class",
    "reference_of",
    "row_file",
    "rows",
    "save",
    "shrink",
    "weights_hash",
    "write",
    "write_config_checkpoint",
]
