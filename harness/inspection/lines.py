"""An inspection for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from harness.inspection.held import Fit
from harness.inspection.inspect import Inspection
from harness.plan import human as human_bytes

WIDTH = 16


def lines(found: Inspection, most: int = 12) -> Iterator[str]:
    """Yield the lines; of long lists the first `most` (--json has all)."""
    yield _line("model type", found.model_type or "(none given)")
    yield _line("architecture", found.architecture or "(none given)")
    where = f", its text fields in {found.text_at}" if found.text_at else ""
    beside = f", beside it {', '.join(found.towers)}" if found.towers else ""
    yield _line("kind", f"{found.kind}{where}{beside}")
    yield _line("bridge", found.bridge or "none")
    if found.text_bridge:
        yield _line("", f"its {found.text_at} alone has one: {found.text_bridge}")
    yield _line("mechanisms", f"{', '.join(found.mechanisms)}  (from {found.mechanisms_from})")
    for near in found.nearest:
        lacks = f"lacks {', '.join(near.lacks)}" if near.lacks else "lacks none of these"
        besides = f"; has besides {', '.join(near.besides)}" if near.besides else ""
        yield _line("nearest", f"{near.row} ({near.architecture}): {lacks}{besides}")
    yield _line("tied", "yes: the head is the embedding" if found.tied else "no")
    yield _line("quantised", _words(found.quantised) if found.quantised else "no")
    yield from _fields(found, most)
    yield from _parameters(found)
    yield from _checkpoint(found, most)
    yield from _layouts(found, most)
    for note in found.notes:
        yield _line("note", note)


def _line(title: str, text: str) -> str:
    return f"{title:<{WIDTH}}{text}"


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if name not in ("quant_method", "quant_algo"))


def _listed(names: Iterable[str], most: int) -> str:
    all_ = list(names)
    more = f", and {len(all_) - most} more" if len(all_) > most else ""
    return ", ".join(all_[:most]) + more


def _fields(found: Inspection, most: int) -> Iterator[str]:
    if (fields := found.fields) is None:
        return
    if fields.problem:
        yield _line("fields", fields.problem)
    if fields.unread:
        yield _line("nobody reads", f"{_listed(fields.unread, most)}  ({fields.reader} does not)")
    for one in fields.unknown[:most]:
        at = f"  read at {one.read_at}" if one.read_at else ""
        value = str(one.value)
        yield _line("unknown", f"{one.name} = {value if len(value) < 60 else value[:57] + '...'}{at}")
    if len(fields.unknown) > most:
        yield _line("", f"and {len(fields.unknown) - most} more fields that {fields.tables} do not know")
    for name, (value, built) in fields.refused.items():
        yield _line("not built", f"{name} = {value!r}: {fields.tables} computes only {name} = {built!r}")
    if fields.missing:
        yield _line("missing", f"{', '.join(fields.missing)}: only the model's own code knows the default")


def _parameters(found: Inspection) -> Iterator[str]:
    if (counted := found.parameters) is None:
        return
    active = f", {human(counted.active)} of them for a token" if counted.active != counted.total else ""
    yield _line("parameters", f"{counted.total:,} = {human(counted.total)}{active}  (from {counted.counted_by})")
    for part, size in sorted(counted.parts.items(), key=lambda item: -item[1]):
        if size * 200 >= counted.total:
            yield _line("", f"{part:<36} {human(size):>9}  {size / counted.total:.1%}")


def _checkpoint(found: Inspection, most: int) -> Iterator[str]:
    if (held := found.checkpoint) is None:
        return
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in held.dtypes.items())
    yield _line("checkpoint", f"{held.tensors:,} tensors, {held.elements:,} elements ({dtypes})")
    if held.compared:
        yield _line("no mapping for", _listed(held.unknown, most) or "none of them")
        yield _line("missing tensors", _listed(held.missing, most) or "none")


def _layouts(found: Inspection, most: int) -> Iterator[str]:
    if (layouts := found.layouts) is None:
        return
    size = f"{layouts.gpus} GPUs of {layouts.memory:g} GiB"
    if layouts.fits:
        yield _line("layouts", f"{len(layouts.fits)} fit {size}, of the GPU that has most:")
    elif layouts.smallest:
        yield _line("layouts", f"none fits {size}; the smallest needs {human_bytes(layouts.smallest.total)}:")
    else:
        yield _line("layouts", f"the model divides into no layout of {layouts.gpus} GPUs")
        return
    header = ("layout", "parameters", "gradients", "optimizer", "in all", "distributed")
    yield _line("", f"{header[0]:<26}" + "".join(f"{title:>15}" for title in header[1:]))
    for fit in [*layouts.fits[:most], *([layouts.smallest] if layouts.smallest else [])]:
        yield _line("", f"{fit.layout:<26}" + "".join(f"{human_bytes(size):>15}" for size in _sizes(fit)))
    yield _line("", layouts.convention)


def _sizes(fit: Fit) -> tuple[int, ...]:
    return fit.parameters, fit.gradients, fit.optimizer, fit.total, fit.optimizer_distributed


def human(count: int) -> str:
    """Return a number of parameters in four digits and a unit: 671 B."""
    value, units = float(count), ["", " K", " M", " B", " T"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.4g}{units[0]}"
