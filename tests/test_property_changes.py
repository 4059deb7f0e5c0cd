"""Changes of one line in the product's import, export, live export and choice of writers: each turns a property red."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bridges import Layout
from bridges.conversion import exact, live, plan, tasks, transfer
from bridges.conversion.walk import Walk
from tests.test_properties import (
    a_live_export_is_the_source,
    every_element_is_imported_and_exported_once,
    every_layer_and_expert_has_one_name,
    narrowing_is_refused_and_copies_must_agree,
    replicas_hold_the_same,
    second_copies_are_imported_and_never_exported,
)


@dataclass(frozen=True)
class Change:
    """In the source of `function`: `old` becomes `new`; `fails` is the property that must not hold any more."""

    function: Callable
    old: str
    new: str
    fails: Callable
    kind: str = "qkv"


ONCE, SAME = every_element_is_imported_and_exported_once, replicas_hold_the_same
LIVE, REFUSED = a_live_export_is_the_source, narrowing_is_refused_and_copies_must_agree
CHANGES = [
    Change(transfer.export_weights, "in destinations(task):", "in destinations(task)[:1]:", ONCE),
    Change(transfer.import_weights, "task.tensor.zero_()", "pass", ONCE, "vocabulary"),
    Change(transfer.import_weights, "if not torch.equal(*same)", "if False", REFUSED),
    Change(transfer.import_weights, "lossy=lossy", "lossy=True", REFUSED),
    Change(exact.ExactCopies.note, "== narrow.dtype", "== values.dtype", REFUSED),
    Change(transfer.is_writer, "coords.cp == 0 and ", "", ONCE),
    Change(transfer.is_writer, "coords.dp == 0 and ", "", ONCE),
    Change(transfer.is_writer, "coords.edp == 0", "coords.dp == 0", ONCE, "experts"),
    Change(transfer.is_writer, "not (replicated and coords.tp)", "True", ONCE, "one"),
    Change(transfer.is_writer, "if task.alias_of", "if False", second_copies_are_imported_and_never_exported),
    Change(transfer.destinations, " + task.repeats", "", ONCE),
    Change(transfer.written, "is_writer(task, coords)", "coords.tp == 1", ONCE),
    Change(transfer.box_view, "tensor.storage_offset() + box.offset", "box.offset", ONCE),
    Change(live.live_export, "torch.zeros(", "torch.ones(", LIVE),
    Change(live.live_export, "if is_writer(task, coords)", "if True", LIVE),
    Change(live.live_export, "get_world_size() > 1", "get_world_size() > 2", LIVE),
    Change(plan.shard_of, "Shard(coords.etp, layout.expert_tp) if mapping.is_expert else ", "", SAME, "experts"),
    Change(plan._boxes, "for b in bound[:p])", "for b in bound[:0])", ONCE),
    Change(plan._rows, "begin, end, 0, size", "begin, begin + 1, 0, size", ONCE),
    Change(tasks.build_tasks, "[] if alias else repeats", "[]", ONCE),
    Change(
        tasks.build_tasks,
        "(tied and name == walk.output_weight) or ",
        "",
        second_copies_are_imported_and_never_exported,
    ),
    Change(
        tasks.global_tensors,
        "parallel_state.get_expert_model_parallel_rank() *",
        "0 *",
        every_layer_and_expert_has_one_name,
    ),
    Change(Walk.layers, "self.number(layer)", "i", every_layer_and_expert_has_one_name),
    Change(Layout.experts, "range(ep_rank * local", "range(0 * local", ONCE, "experts"),
    Change(Layout.coords, "inner // etp % self.ep", "inner // self.tp % self.ep", ONCE, "experts"),
]


def rewritten(change: Change) -> Callable:
    """The function with the line changed, in the same module's names."""
    lines = inspect.getsource(inspect.unwrap(change.function))
    indent = len(lines) - len(lines.lstrip())
    source = "\n".join(line[indent:] for line in lines.splitlines())
    assert source.count(change.old) >= 1, f"{change.old!r} is not in {change.function.__qualname__} any more"
    module = sys.modules[change.function.__module__]
    names = dict(vars(module))
    exec("from __future__ import annotations\n" + source.replace(change.old, change.new), names)
    return names[change.function.__name__]


def put(patch: pytest.MonkeyPatch, function: Callable, other: Callable) -> None:
    """In every place that has the function under a name."""
    if "." in function.__qualname__:
        home = getattr(sys.modules[function.__module__], function.__qualname__.partition(".")[0])
        patch.setattr(home, function.__name__, other)
        return
    for module in list(sys.modules.values()):
        if module is not None and module.__name__.startswith("bridges") and module is not sys.modules[__name__]:
            for name, value in list(vars(module).items()):
                if value is function:
                    patch.setattr(module, name, other)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: f"{c.function.__name__}-{c.old.strip()[:30]}")
def test_fault_H_a_change_of_one_line_turns_a_property_red(change, monkeypatch):
    """The property that is green above fails with the changed function in the product."""
    put(monkeypatch, change.function, rewritten(change))
    plan._boxes.cache_clear()

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        derandomize=True,
        report_multiple_bugs=False,
    )
    @given(data=st.data())
    def holds(data):
        change.fails(data, change.kind)

    try:
        with pytest.raises((AssertionError, ValueError, RuntimeError, pytest.fail.Exception)):
            holds()
    finally:
        getattr(plan._boxes, "cache_clear", lambda: None)()
