"""Verify a toy of every config.json in a folder and print a table, as docs/coverage.md has it.

python scripts/coverage.py FOLDER > docs/coverage.md
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bridges import GoldengateError
from harness import verify
from harness.flops.command import load_bridge
from harness.quiet import quiet
from harness.report.cells import Report

LAYOUTS = ("tp1", "tp2-pp2-sp")
WITH_EXPERTS = ("tp1", "tp2-pp2-sp", "ep2")


def line(file: Path) -> tuple[str, str]:
    """(what came of it, a word on it) of one config."""
    try:
        experts = load_bridge(str(file), False).to_megatron_provider(load_weights=False).num_moe_experts
        report: Report = verify(str(file), layouts=WITH_EXPERTS if experts else LAYOUTS)
    except (GoldengateError, ValueError) as error:
        kind = "no bridge" if "has no bridge" in str(error) else "refused"
        return kind, str(error).splitlines()[0].replace(f"{file.parent}/", "")
    wrong = [f"{c.layout} {c.check}: {c.detail}" for c in report.cells if c.status in ("fail", "error")]
    found = report.summary()
    return (
        ("pass", f"{found['pass']} cells")
        if not wrong and found["pass"]
        else ("FAIL", wrong[0] if wrong else "no cell")
    )


def main(folder: str) -> None:
    quiet()
    files = sorted(Path(folder).glob("*.json"))
    lines, begin = [], time.time()
    for file in files:
        kind, word = line(file)
        lines.append((file.stem, kind, word))
        print(f"{time.time() - begin:6.0f} s  {kind:9} {file.stem}: {word}", file=sys.stderr, flush=True)
    print(
        f"# Coverage\n\nToys of {len(files)} published configs, made and verified by `scripts/coverage.py` in "
        f"{', '.join(WITH_EXPERTS)}: {sum(kind == 'pass' for _, kind, _ in lines)} pass.\n"
    )
    print("| config | | |\n|---|---|---|")
    for name, kind, word in lines:
        print(f"| {name} | {kind} | {word.replace('|', '/')} |")


if __name__ == "__main__":
    main(sys.argv[1])
