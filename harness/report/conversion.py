"""What a conversion took, in lines on standard error."""

from __future__ import annotations

from typing import Any

from harness.report.console import Console


def say(result: dict[str, Any]) -> None:
    """Print seconds, bandwidth, each rank's memory and the differences of a round trip."""
    console, gb = Console(stderr=True), result["bytes"] / 1e9
    console.print(
        f"{gb:.2f} GB: import {result['import_s']:.1f} s ({gb / result['import_s']:.2f} GB/s), "
        f"export {result['export_s']:.1f} s ({gb / result['export_s']:.2f} GB/s), compared in "
        f"{result['compare_s']:.1f} s",
        highlight=False,
    )
    for rank, m in enumerate(result["peak_mib"]):
        console.print(
            f"rank {rank}: {m['private']:,.0f} MiB of its own ({m['parameters']:,.0f} MiB parameters), peak with "
            f"mapped files {m['peak']:,.0f} MiB",
            highlight=False,
        )
    for line in result["differences"]:
        console.print(f"DIFFERS  {line}", highlight=False, markup=False, soft_wrap=True)
    if not result["differences"]:
        console.print(f"bit-exact in {result['layout']}", highlight=False)
