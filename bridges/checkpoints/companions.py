"""Which files of a model's folder travel with it: all but weights, what training left, and hidden ones.

One rule serves exports, Megatron folders and downloads from the hub.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from bridges.checkpoints.reader import CheckpointError, check_inside

# Weights in formats that are not read here, and what training keeps beside them: neither copied nor downloaded. The
# patterns are fnmatch's over the path below the folder, as the hub's own are; * matches / too.
LEFT_BEHIND = (
    *(f"*.{kind}" for kind in ("bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "onnx_data", "ot")),
    *(f"*.{kind}" for kind in ("npz", "npy", "pkl", "pickle", "nemo", "distcp", "tflite", "mlmodel", "pdparams")),
    *("*.bin.index.json", "consolidated*.safetensors", "*/*.safetensors", "*/*.safetensors.index.json"),
    *(
        "iter_*/*",
        "latest_checkpointed_iteration.txt",
        "goldengate_outline.json",
        "goldengate_digests.json",
    ),  # Megatron's, see checkpoints.megatron
    *("checkpoint-*/*", "global_step*/*", "trainer_state.json", "*tfevents*"),
    *(".*", "*/.*", "__pycache__/*", "*/__pycache__/*"),
)


def travels(path: str) -> bool:
    """Whether the file at `path`, relative to its model's folder, belongs to every copy of the model."""
    return not any(fnmatch(path, pattern) for pattern in (*LEFT_BEHIND, "*.safetensors", "*.safetensors.index.json"))


def companions(folder: Path) -> dict[str, Path]:
    """The files that travel with the model in `folder`: {path below it: where to read it}, config.json among them.

    Raises CheckpointError, naming all, for links that lead nowhere or out of the folder and for what is no plain file;
    call it before work starts.
    """
    found = {path: folder / path for path in sorted(_files(folder)) if travels(path)}
    broken = [path for path, file in found.items() if not file.exists() or not stat.S_ISREG(file.stat().st_mode)]
    if broken:
        raise CheckpointError(
            f"{folder}: {', '.join(broken)} would travel with the model and is no file that can be read (a dead link?): "
            "restore or remove it"
        )
    for path in found:
        check_inside(folder, path)
    return found


def _files(folder: Path, below: str = "") -> Iterator[str]:
    """Paths of all that is not a folder. A link to a folder is followed when it stays inside, hidden ones are not."""
    for entry in os.scandir(folder / below):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder, path)
        elif entry.is_dir():  # a link to a folder: its files are links out of here, or stand here already
            raise CheckpointError(f"{folder}: {path} is a link to a folder: replace it by the folder itself")
        else:
            yield path
