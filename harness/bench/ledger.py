"""The ledger: JSONL, one line a case and process, one file a device, appended to and never edited.

Every line carries a digest of itself, so that an edited number shows; lines from two branches merge in any order. That no
line was taken out is for the repository's history to show.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bridges.errors import GoldengateError

SCHEMA = "goldengate-bench-1"
Record = dict[str, Any]

# Field -> type of its value. Times are in seconds, sizes in bytes, FLOPs and rates plain.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": str,
    "time_utc": str,
    "process": str,  # one id for all lines of a process
    "commit": str,
    "dirty": (bool, type(None)),
    "label": (str, type(None)),
    "case": str,
    "case_hash": str,  # of `settings`
    "settings": dict,
    "device": dict,
    "versions": dict,
    "ceiling": dict,
    "flops": dict,
    "bytes": int,
    "rounds_s": list,
    "median_s": float,
    "tflops": (float, type(None)),
    "fraction_of_ceiling": (float, type(None)),
    "bytes_per_s": (float, type(None)),
    "roofline": dict,
    "peak_bytes": (int, type(None)),
    "digest": str,
}


class LedgerError(GoldengateError, ValueError):
    """A ledger that cannot be trusted or read: the message names the file and the line."""


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def slug(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3"""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


def sealed(record: Record) -> Record:
    """The record with its schema and digest."""
    body = {"schema": SCHEMA, **{key: value for key, value in record.items() if key != "digest"}}
    return {**body, "digest": digest(body)}


def problem(record: Any, file_slug: str | None = None) -> str | None:
    """What is wrong with a line, or None. `file_slug`: the device that its file is for."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get("schema") != SCHEMA:
        return f"schema {record.get('schema')!r}, this version reads {SCHEMA!r}"
    if set(record) != set(FIELDS):
        return f"fields missing or foreign: {', '.join(sorted(set(record) ^ set(FIELDS)))}"
    for name, kind in FIELDS.items():
        if not isinstance(record[name], kind):
            return f"{name} is {record[name]!r}"
    if record["digest"] != digest({k: v for k, v in record.items() if k != "digest"}):
        return "its digest does not match: the line was edited"
    if record["case_hash"] != digest(record["settings"]):
        return "case_hash is not that of its settings"
    rounds = record["rounds_s"]
    if not rounds or not all(isinstance(s, float) and s > 0 for s in rounds):
        return "rounds_s does not hold seconds above 0"
    name = record["device"].get("name")
    if not isinstance(name, str):
        return "device has no name"
    if file_slug is not None and slug(name) != file_slug:
        return f"device {name!r} belongs into {slug(name)}.jsonl"
    return None


def read(path: Path) -> list[Record]:
    """All lines, in order. LedgerError for the first that is edited, foreign, or measured twice."""
    try:
        text = path.read_text()
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}") from None
    if text and not text.endswith("\n"):
        raise LedgerError(f"{path}: the last line has no end, a write was cut off: take it out and measure again")
    records: list[Record] = []
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            raise LedgerError(f"{path}:{number}: not JSON") from None
        if wrong := problem(record, path.stem):
            raise LedgerError(f"{path}:{number}: {wrong}")
        key = (record["process"], record["case"])
        if key in seen:
            raise LedgerError(f"{path}:{number}: process {key[0]} has {key[1]} twice: a process counts once")
        seen.add(key)
        records.append(record)
    return records


def append(folder: Path, record: Record) -> Path:
    """Add one line to the device's file and return the file. LedgerError when the file or the record is not in order:
    nothing is written then."""
    record = sealed(record)
    path = folder / f"{slug(str(record['device'].get('name')))}.jsonl"
    if wrong := problem(record, path.stem):
        raise LedgerError(f"this record does not fit the ledger: {wrong}")
    if path.exists():
        for known in read(path):
            if (known["process"], known["case"]) == (record["process"], record["case"]):
                raise LedgerError(f"{path}: process {record['process']} has {record['case']} already")
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(canonical(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return path


def select(selection: str) -> list[Record]:
    """Lines of `FILE`, or of `FILE@WORD` those whose commit begins with the word or whose label is it; of `FILE@WORD@WORD`
    those for which both hold. LedgerError when there are none."""
    name, words = selection, []
    while "@" in Path(name).name and not Path(name).exists():
        name, _, word = name.rpartition("@")
        words.append(word)
    if "" in words:
        raise LedgerError(f"{selection}: after @ a commit or a label is needed")
    records = [
        r for r in read(Path(name)) if all(r["label"] == word or _is_commit(r["commit"], word) for word in words)
    ]
    if not records:
        wanted = " and ".join(map(repr, reversed(words)))
        raise LedgerError(f"{selection}: no line{f' of commit or label {wanted}' if words else ''} in {name}")
    return records


def run_of(record: Record) -> str:
    """What its line is one process of: the label, if any, and the commit."""
    label = f"{record['label']} " if record["label"] else ""
    return f"{label}{record['commit'][:9]}"


def _is_commit(commit: str, word: str) -> bool:
    return commit == word or (len(word) >= 7 and commit.startswith(word))


def by_case(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["case"], []).append(record)
    return found
