"""Counting what the dispatcher executes, by module, forward and backward.

torch's FlopCounterMode counts an operation that it does not know as 0. Here every operation is in one of three lists: a
formula, no arithmetic of matmul kind (`FREE`), or an error that names it. FlopCounterMode runs beside it, so that the two
totals can be compared: they differ by the corrections that are listed, and by nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bridges.errors import GoldengateError
from harness.flops.free_ops import COMMUNICATION, FREE

aten: Any = torch.ops.aten


class UncountedOp(GoldengateError, RuntimeError):
    """An operation that neither has a formula nor is known to have no FLOPs."""


def _convolution_backward(grad_shape, x_shape, w_shape, transposed, groups, output_mask) -> int:
    """Of any number of groups. torch's own formula counts the gradient of a grouped convolution's weight as if every output
    channel met every input channel."""
    if transposed:
        raise UncountedOp("aten.convolution_backward of a transposed convolution has no formula here")
    one = 2 * grad_shape[0] * prod(grad_shape[2:]) * prod(w_shape)  # w is [out, in / groups, *taps]
    return one * (int(output_mask[0]) + int(output_mask[1]))


def _conv_backward_of_call(out, grad, x, w, bias, stride, padding, dilation, transposed, output_padding, groups, mask):
    return _convolution_backward(grad.shape, x.shape, w.shape, transposed, groups, mask)


def _attention(q, k, v) -> int:
    """Scores and values of [b, heads, s, d] without regard to a mask, as torch counts its other attention kernels."""
    return 2 * prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])


def _attention_backward(out, grad, q, k, v, *args, **kwargs) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    return 2 * prod(q.shape[:3]) * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])


def _grouped_mm(out, a, b, offs=None, *args, **kwargs) -> int:
    """2d x 3d, 3d x 2d, 3d x 3d: the rows are split among groups; 2d x 2d: the contracted dim is."""
    if a.dim() == 2 and b.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    rows = a.shape[0] if a.dim() == 2 else a.shape[-3] * a.shape[-2]
    if b.dim() == 2:  # a [groups, m, k], b [k, n]: every column of b belongs to one group
        return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
    return 2 * rows * a.shape[-1] * b.shape[-1]


def _op(name: str) -> Any:
    return getattr(aten, name, None)


# Arithmetic of matmul kind that torch 2.11 counts as 0, or wrongly: operation -> formula of (output, *arguments).
OURS: dict[Any, Callable[..., int]] = {
    op: formula
    for name, formula in {
        "_scaled_dot_product_flash_attention_for_cpu": lambda out, q, k, v, *a, **kw: _attention(q, k, v),
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "_grouped_mm": _grouped_mm,
        "mv": lambda out, a, b: 2 * a.shape[0] * a.shape[1],
        "addmv": lambda out, c, a, b, **kw: 2 * a.shape[0] * a.shape[1],
        "dot": lambda out, a, b: 2 * a.shape[0],
        "vdot": lambda out, a, b: 2 * a.shape[0],
        "addr": lambda out, c, a, b, **kw: 2 * a.shape[0] * b.shape[0],
        "addbmm": lambda out, c, a, b, **kw: 2 * prod(a.shape) * b.shape[2],
        "triangular_solve": lambda out, b, a, *args, **kw: prod(b.shape) * a.shape[-1],
        "linalg_solve_triangular": lambda out, a, b, *args, **kw: prod(b.shape) * a.shape[-1],
        "convolution_backward": _conv_backward_of_call,
    }.items()
    if (op := _op(name)) is not None
}


@dataclass(frozen=True)
class Counted:
    """One counted operation: FLOPs, where (module path), which operation, in the forward or the backward."""

    flops: int
    module: str
    op: str
    backward: bool


@dataclass
class Modules:
    """Which module runs. In the backward that is the module in whose forward the autograd node was made: nodes are numbered
    in the order of their making."""

    stack: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def _mark(self) -> None:
        self.numbers.append(torch.autograd._get_sequence_nr())
        self.names.append(self.stack[-1] if self.stack else "")

    def enter(self, name: str) -> None:
        self.stack.append(name)
        self._mark()

    def leave(self) -> None:
        self.stack.pop()
        self._mark()

    def current(self) -> tuple[str, bool]:
        """(module path, in the backward?)"""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return (self.stack[-1] if self.stack else ""), False
        at = bisect_right(self.numbers, node._sequence_nr()) - 1
        return (self.names[at] if at >= 0 else ""), True


class OpCounter(TorchDispatchMode):
    """FLOPs of every operation in the `with` block, by module. Raises UncountedOp for one that is in no list."""

    def __init__(self, modules: Modules | None = None):
        super().__init__()
        self.modules = modules or Modules()
        self.counted: list[Counted] = []
        self.torch_total = 0  # what FlopCounterMode made of the same operations
        self.corrections: Counter[str] = Counter()  # operation -> ours minus torch's

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = f"{packet._qualified_op_name.replace('::', '.')}"
        flops = count_call(packet, name, out, args, kwargs or {})
        if flops:
            module, backward = self.modules.current()
            self.counted.append(Counted(flops, module, name, backward))
            torchs = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
            if flops != torchs:
                self.corrections[name] += flops - torchs
        return out

    @property
    def total(self) -> int:
        return sum(c.flops for c in self.counted)


def count_call(packet: Any, name: str, out: Any, args: tuple, kwargs: dict) -> int:
    """FLOPs of one call; UncountedOp when nothing is known about the operation."""
    if packet in OURS:
        return OURS[packet](out, *args, **kwargs)
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if name in FREE or name.split(".")[0] in COMMUNICATION:
        return 0
    raise UncountedOp(
        f"operation {name} is not known to the FLOPs counter: give it a formula in harness/flops/counter.py, or list it in "
        "harness/flops/free_ops.py when it does no arithmetic of matmul kind"
    )


@contextmanager
def counting(models: dict[str, torch.nn.Module]) -> Iterator[OpCounter]:
    """Count in the `with` block, with the modules of `models` (prefix -> model) tracked by name.

    FlopCounterMode counts the same operations; its total must be ours less our corrections, else RuntimeError.
    """
    counter = OpCounter()
    handles = []
    for prefix, model in models.items():
        for name, module in model.named_modules():
            path = f"{prefix}.{name}".strip(".")
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: counter.modules.enter(path)))
            handles.append(module.register_forward_hook(lambda m, a, o: counter.modules.leave(), always_call=True))
    reference = FlopCounterMode(display=False)
    try:
        with counter, reference:
            yield counter
    finally:
        for handle in handles:
            handle.remove()
    counter.torch_total = reference.get_total_flops()
    if counter.total - sum(counter.corrections.values()) != counter.torch_total:
        raise RuntimeError(
            f"FlopCounterMode counts {counter.torch_total}, this counter {counter.total} with corrections "
            f"{dict(counter.corrections)}: one of them misses an operation"
        )
