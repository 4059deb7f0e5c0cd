"""What is counted: sequences, a convention, kernels; and the named parts that come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from harness.flops.fields import FlopsError

Convention = Literal["model", "causal", "hardware"]
Kernels = Literal["torch", "fused"]
# What tensor-parallel ranks do of a part: a share; all of it unless the sequence is cut among them; or all of it always.
Replicated = Literal["", "without sequence parallel", "always"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
KERNELS: tuple[str, ...] = get_args(Kernels)

CHUNK = 64  # tokens a chunk of the gated delta rule, in Megatron's torch path and in flash-linear-attention


@dataclass(frozen=True)
class Part:
    """FLOPs of one named piece of work in one place (`layers.3`, `mtp.0`, `output`), for the whole batch, done once."""

    name: str
    place: str
    forward: int
    backward: int
    replicated: Replicated = ""

    def copies(self, tp: int, sp: bool) -> int:
        """How often `tp` tensor-parallel ranks together do this work."""
        return tp if self.replicated == "always" or (self.replicated and not sp) else 1

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Run:
    """Sequence lengths and the convention under which they are counted; see docs/flops.md.

    `model`: every query meets every key (or its whole window). `causal`: half of that; a window exactly by position.
    `hardware`: what the kernels execute, those of this repository's CPU backend (`torch`) or a GPU's (`fused`).
    """

    lengths: tuple[int, ...]
    convention: Convention = "causal"
    kernels: Kernels = "torch"
    counts: Counter[int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise FlopsError(f"convention {self.convention!r} is not known: {', '.join(CONVENTIONS)}")
        if self.kernels not in KERNELS:
            raise FlopsError(f"kernels {self.kernels!r} are not known: {', '.join(KERNELS)}")
        if not self.lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.lengths):
            raise FlopsError(f"sequence lengths {list(self.lengths)[:4]!r}: at least one, each a whole number above 0")
        object.__setattr__(self, "counts", Counter(self.lengths))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def hardware(self) -> bool:
        return self.convention == "hardware"

    def twice_pairs(self, seen: int | None = None) -> int:
        """Twice the number of (query, key) pairs that are counted, each sequence for itself, where a query meets its
        `seen` nearest keys at most. Twice, so that half of an odd square is whole."""
        return sum(many * self._twice_pairs(length, seen) for length, many in self.counts.items())

    def _twice_pairs(self, length: int, seen: int | None) -> int:
        span = length if seen is None else min(seen, length)
        if self.convention == "model":
            return 2 * length * span
        if self.hardware and self.kernels == "torch":
            return 2 * length * length  # the mask is applied to whole scores
        exact = 2 * length * span - span * (span - 1)  # the sum over positions i = 1..length of min(i, span)
        # The convention's half leaves out half of the diagonal; a window never costs more than no window.
        return exact if self.hardware else min(exact, length * length)

    # -- parts -------------------------------------------------------------------------------------------------------

    def linear(self, name: str, place: str, inputs: int, outputs: int, *, replicated: Replicated = "") -> Part:
        """A matrix product for every token: 2 FLOPs a weight, and twice that backward (for input and for weight)."""
        forward = 2 * self.tokens * inputs * outputs
        return Part(name, place, forward, 2 * forward, replicated)

    def attention(self, name: str, place: str, keys: int, values: int, seen: int | None = None) -> Part:
        """Scores (`keys` channels, all heads) and weighted values; fused kernels compute the scores again backward."""
        twice = self.twice_pairs(seen)
        again = twice * keys if self.hardware and self.kernels == "fused" else 0
        return Part(name, place, twice * (keys + values), 2 * twice * (keys + values) + again)


@dataclass(frozen=True)
class Flops:
    """The count: its parts in model order, and the run that they belong to. `str()` is the table by part."""

    run: Run
    parts: tuple[Part, ...]

    @property
    def forward(self) -> int:
        return sum(p.forward for p in self.parts)

    @property
    def backward(self) -> int:
        return sum(p.backward for p in self.parts)

    @property
    def total(self) -> int:
        """Forward and backward, for the whole batch."""
        return self.forward + self.backward

    @property
    def per_token(self) -> float:
        return self.total / self.run.tokens

    def by_part(self) -> dict[str, Part]:
        """Parts of the same name added up over all layers; their `place` says how many layers that is."""
        found: dict[str, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.name, []).append(part)
        return {
            name: Part(
                name,
                str(len(same)),
                sum(p.forward for p in same),
                sum(p.backward for p in same),
                same[0].replicated,
            )
            for name, same in found.items()
        }

    def by_place(self) -> dict[str, int]:
        """Forward and backward FLOPs by layer."""
        found: dict[str, int] = {}
        for part in self.parts:
            found[part.place] = found.get(part.place, 0) + part.total
        return found

    def as_dict(self) -> dict:
        return {
            "convention": self.run.convention,
            "kernels": self.run.kernels if self.run.hardware else None,
            "sequences": len(self.run.lengths),
            "tokens": self.run.tokens,
            "forward": self.forward,
            "backward": self.backward,
            "total": self.total,
            "per_token": self.per_token,
            "parts": [
                {
                    "part": p.name,
                    "layers": int(p.place),
                    "forward": p.forward,
                    "backward": p.backward,
                    "total": p.total,
                    "share": p.total / self.total,
                    "replicated": p.replicated or None,
                }
                for p in self.by_part().values()
            ],
            "layers": self.by_place(),
        }


def sequences(seq: int, batch: int, packed: Sequence[int] | None) -> tuple[int, ...]:
    """The lengths of a batch: `batch` sequences of `seq` tokens, or of each packed length when packed."""
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise FlopsError(f"batch is {batch!r}, a whole number above 0 is needed")
    if packed is None:
        return (seq,) * batch
    if sum(packed) > seq:
        raise FlopsError(f"packed lengths sum to {sum(packed)}, more than the sequence of {seq} tokens")
    return tuple(packed) * batch
