"""Copies between dtypes: widening is always exact; narrowing is where every value survives it, and else needs permission."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from bridges.conversion.plan import PlanError

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CHECKPOINT, MEGATRON = "the checkpoint", "Megatron"


@dataclass
class ExactCopies:
    """Copies blocks and remembers every tensor that lost precision; `check` then names all of them in one error.

    `source` and `target` say where values come from and go to; `remedy` is what to do about a loss of a wide dtype.
    """

    source: str
    target: str
    lossy: bool
    remedy: str  # with {dtype} where the wide dtype goes
    lost: dict[tuple[torch.dtype, torch.dtype], list[str]] = field(default_factory=dict)

    def copy(self, name: str, to: torch.Tensor, values: torch.Tensor) -> None:
        """`to.copy_(values)`. Raises PlanError at once for quantised codes and for integers as floats."""
        self.check_kinds(name, values.dtype, to.dtype)
        to.copy_(values)
        self.note(name, to, values)

    def check_kinds(self, name: str, source: torch.dtype, target: torch.dtype) -> None:
        if source != target and (source in _FP8 or target in _FP8 or (source in _INTEGERS) != (target in _INTEGERS)):
            raise PlanError(
                f"{name} is {_short(source)} in {self.source} and {_short(target)} in {self.target}: quantised or "
                "integer weights are not converted; dequantise the checkpoint first"
            )

    def note(self, name: str, narrow: torch.Tensor, values: torch.Tensor) -> None:
        """Remember `name` when `values` cannot be had back from `narrow`, their copy in another dtype."""
        kinds = values.dtype, narrow.dtype
        if self.lossy or torch.promote_types(*kinds) == narrow.dtype or name in self.lost.get(kinds, ()):
            return
        back = narrow.to(device=values.device, dtype=values.dtype)
        if not bool(((back == values) | values.isnan()).all()):
            self.lost.setdefault(kinds, []).append(name)

    def check(self) -> None:
        """Raise PlanError for all tensors that lost precision."""
        for (wide, narrow), names in self.lost.items():
            patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
            raise PlanError(
                f"{', '.join(patterns)} ({len(names)} in all) {'is' if len(names) == 1 else 'are'} {_short(wide)} in "
                f"{self.source} and {_short(narrow)} in {self.target}: precision would be lost; "
                + self.remedy.format(dtype=_short(wide))
            )


def importing(*, lossy: bool) -> ExactCopies:
    """From a Hugging Face checkpoint into Megatron's parameters."""
    remedy = "set provider.params_dtype = torch.{dtype} (--dtype {dtype}) or allow it with lossy=True (--lossy)"
    return ExactCopies(CHECKPOINT, MEGATRON, lossy, remedy)


def exporting(*, lossy: bool) -> ExactCopies:
    """From Megatron's parameters into a Hugging Face checkpoint."""
    remedy = "export with dtype=torch.{dtype} (--dtype {dtype}) or allow it with lossy=True (--lossy)"
    return ExactCopies(MEGATRON, CHECKPOINT, lossy, remedy)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
