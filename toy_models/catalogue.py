"""The row files: one hub-style config.json each, and guests that have no file here.

Keys of a row file that start with an underscore are ours: `_base` (the row of which it is a twin), `_inputs_seed`, `_mtp`,
`_as_in_memory`, `_reference`.
"""

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROWS = Path(__file__).parent / "rows"

_guests: dict[str, dict] = {}
_further: list[Path] = []


def rows() -> list[str]:
    """Return the names of the rows that have a file, sorted, each base before its twins; those of `add_rows` come last."""
    return [*_rows_in(ROWS), *further_rows()]


def further_rows() -> list[str]:
    """Return the names of the rows in the folders of `add_rows`."""
    return sorted(name for folder in _further for name in _rows_in(folder))


def _rows_in(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".json") for path in folder.glob("*.json"))


def add_rows(folder: Path) -> None:
    """Count the row files of a folder of somebody else as well, from now on. Adding it again changes nothing.

    Raises ValueError for a folder that is not there, that holds no row, or whose row has a name that is taken.
    """
    if folder in _further:
        return
    if not folder.is_dir() or not (names := _rows_in(folder)):
        raise ValueError(
            f"{folder} {'holds no row (*.json)' if folder.is_dir() else 'is not a folder'}: rows come from there"
        )
    if taken := sorted({*names} & {*rows(), *_guests}):
        raise ValueError(f"{folder}: there is a row named {', '.join(taken)} already: choose another name")
    _further.append(folder)


def home(row: str) -> Path:
    """Return the folder that a row's file is in; ValueError: unknown row."""
    for folder in (ROWS, *_further):
        if row in _rows_in(folder):
            return folder
    near = difflib.get_close_matches(row, [*rows(), *_guests], cutoff=0.3) or rows()
    raise ValueError(f"no toy row {row!r}; nearest: {', '.join(near)}")


@contextmanager
def guests(files: Mapping[str, dict]) -> Iterator[None]:
    """Count these row files as well while the context lasts: a stranger's config, the rows of somebody's plugin.

    Raises ValueError for a name that a row has already.
    """
    if taken := sorted(set(files) & {*rows(), *_guests}):
        raise ValueError(f"there is a row named {taken[0]} already: choose another name")
    _guests.update(copy.deepcopy(dict(files)))
    try:
        yield
    finally:
        for name in files:
            del _guests[name]


def amend_guest(row: str, **fields) -> None:
    """Change fields of a guest's file."""
    _guests[row].update(fields)


def is_guest(row: str) -> bool:
    """Say whether a row comes from `guests`."""
    return row in _guests


def row_file(row: str) -> dict:
    """Return the row's file over its base's, underscored keys included. ValueError: unknown row."""
    config = _guests[row] if row in _guests else _read(row)
    return copy.deepcopy({**row_file(config["_base"]), **config} if "_base" in config else config)


def config_dict(row: str) -> dict:
    """Return the row's config.json, a twin merged with its base. ValueError: unknown row."""
    return {key: value for key, value in row_file(row).items() if not key.startswith("_")}


@cache
def _read(row: str) -> dict:
    return json.loads((home(row) / f"{row}.json").read_text())
