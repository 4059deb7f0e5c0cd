"""Goldens: logits and fingerprints of gradients of Hugging Face's own implementation, with the evidence for them.

`goldens/<row>.safetensors` holds the tensors and, as its only metadata entry (safetensors with several is
not stable byte for byte), a JSON string `provenance`. It names neither dates nor machines, so regenerating
gives the same bytes.
"""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.overrides import TorchFunctionMode

import goldens
import toy_models
from bridges.errors import GoldengateError
from harness.reference.compare import relative_rms
from harness.reference.gradients import cotangents, fingerprints, hf_gradients, worst_difference

FOLDER = Path(goldens.__file__).parent
_further: list[Path] = []  # of repositories that are not ours
GATE = 1e-4  # relative RMS that a Megatron model's logits may differ by, in fp32
GRADIENT_GATE_LIMIT = 1e-3  # no row's gate for gradients may be wider
SEEDS_TRIED = 16  # inputs of a live reference
NOISE_FACTOR = 10  # a gate is never below this many times the row's own noise
LIBRARIES = ("goldengate", "numpy", "torch", "transformers")


class LiveReferenceError(GoldengateError, ValueError):
    """Hugging Face's own class fails on a toy: the message is its first line."""


class UndecidedError(GoldengateError, ValueError):
    """The reference says one thing in fp32 and another in fp64 on a row's inputs, as where two experts tie."""


@dataclass(frozen=True)
class Golden:
    """A row's reference values.

    `tensors` has `inputs`, int64 [batch, sequence], `logits`, float32 [batch, sequence, vocab], and `gradients`, the
    fingerprints of harness.reference.gradients; rows with multi-token prediction have `mtp_logits_<k>`, float32 [batch,
    sequence - k, vocab]. `provenance` says where they come from: row, config_hash, weights_hash, tensors_hash, seed,
    versions, command, reason, noise (relative RMS of logits, fp32_vs_fp64 and eager_vs_sdpa), gate (the relative RMS
    limit), gradient_noise (fp32 against fp64, the worst tensor) and gradient_gate.
    """

    row: str
    tensors: dict[str, torch.Tensor]
    provenance: dict

    @property
    def inputs(self) -> torch.Tensor:
        return self.tensors["inputs"]

    @property
    def logits(self) -> torch.Tensor:
        return self.tensors["logits"]

    @property
    def mtp_logits(self) -> list[torch.Tensor]:
        """[batch, sequence - k, vocab] of the heads k = 1, 2, ... (none for most rows)."""
        return [self.tensors[name] for name in sorted(self.tensors) if name.startswith("mtp_logits_")]

    @property
    def gate(self) -> float:
        return self.provenance["gate"]

    @property
    def gradient_gate(self) -> float:
        """Relative RMS that the gradient of each parameter may differ by."""
        return self.provenance["gradient_gate"]


@dataclass(frozen=True)
class Drift:
    """What a regeneration changes.

    `value` is the relative RMS of the new logits against the old, None without an old golden, infinite if
    the shapes differ. `changed` names what differs in the provenance: config, weights, inputs, a library's
    version.
    """

    row: str
    value: float | None
    changed: tuple[str, ...]

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.row}: new golden"
        return f"{self.row}: logits drift {self.value:.3g}; changed: {', '.join(self.changed) or 'nothing'}"


def path(row: str) -> Path:
    """Return where the row's golden lies, or would: beside ours, or for a row of `toy_models.add_rows` in the first folder of
    `add_folder` that has it. ValueError for such a row when there is no such folder."""
    name = f"{row}.safetensors"
    if row not in toy_models.further_rows():
        return FOLDER / name
    if not _further:
        raise ValueError(f"no folder for the golden of row {row}: name one in [tool.goldengate], goldens = [...]")
    return next((folder / name for folder in _further if (folder / name).exists()), _further[0] / name)


def add_folder(folder: Path) -> None:
    """Look for goldens of rows of `toy_models.add_rows` in this folder as well, from now on. ValueError: it is not there."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: goldens lie there")
    if folder not in _further:
        _further.append(folder)


def list_goldens() -> list[str]:
    """The rows that have a golden file, sorted."""
    files = [file for folder in (FOLDER, *_further) for file in folder.glob("*.safetensors")]
    return sorted({file.name.removesuffix(".safetensors") for file in files})


def missing() -> list[str]:
    """Rows without a golden."""
    return sorted(set(toy_models.rows()) - set(list_goldens()))


def orphans() -> list[str]:
    """Goldens without a row."""
    return sorted(set(list_goldens()) - set(toy_models.rows()))


def regen_command(row: str, reason: str = "...") -> str:
    """The command line that makes the row's golden."""
    quoted = '"..."' if reason == "..." else shlex.quote(reason)
    return f"goldengate golden regen {shlex.quote(row)} --reason {quoted}"


def hash_config(config: Mapping) -> str:
    """sha256 of a config dict, independent of the order of its keys."""
    return hashlib.sha256(_canonical(config).encode()).hexdigest()


def load(row: str) -> Golden:
    """Read the row's golden. ValueError, with the command that makes it, if it is missing or was edited."""
    toy_models.config_dict(row)  # names the nearest rows if there is no such row
    if not path(row).exists():
        raise ValueError(f"row {row} has no golden; make it with: {regen_command(row)}")
    golden = _read(row)
    if golden.provenance["tensors_hash"] != toy_models.weights_hash(golden.tensors):
        raise ValueError(
            f"golden of row {row}: the tensors do not match the hash in its provenance; restore the file, "
            f"or make it anew with: {regen_command(row)}"
        )
    return golden


def compute(row: str, reason: str, command: str) -> Golden:
    """The row's golden from HF in fp32 with eager attention on the CPU; nothing is written. One thread computes, as in the
    ranks: sums do not depend on how many cores the machine has.

    Noise is measured against fp64 with the same weights and, where transformers has it, sdpa attention. ValueError without a
    reason, and while either differs by more than 1e-4, or a gradient by more than 1e-4 from fp64's: then the
    reference itself is in doubt.
    """
    if not reason.strip():
        raise ValueError(f"row {row}: a golden needs a reason; give one with: {regen_command(row)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compute(row, reason, command)
    finally:
        torch.set_num_threads(threads)


def _compute(row: str, reason: str, command: str) -> Golden:
    ids = toy_models.inputs(row)
    model = toy_models.build(row)
    found = reference_logits(model, ids)
    # transformers has one attention implementation only for models with a softcap or sinks.
    other = reference_logits(toy_models.build(row, attn_implementation="sdpa"), ids) if model._supports_sdpa else found
    weights = cotangents(row, list(found.values()))
    gradients = hf_gradients(row, model, ids, weights)
    with _Double():
        double = toy_models.build(row, dtype=torch.float64)
        exact, exact_gradients = reference_logits(double, ids), hf_gradients(row, double, ids, weights)
    noise = {
        "eager_vs_sdpa": _three_digits(max(relative_rms(other[key], found[key]) for key in found)),
        "fp32_vs_fp64": _three_digits(max(relative_rms(found[key], exact[key]) for key in found)),
    }
    if noise["eager_vs_sdpa"] > GATE:
        raise ValueError(
            f"row {row}: HF's eager and sdpa attention differ by {noise['eager_vs_sdpa']} (limit {GATE}), so "
            "neither can be the reference; find out which is wrong before making a golden"
        )
    if noise["fp32_vs_fp64"] > GATE:
        raise UndecidedError(
            f"row {row}: HF in fp32 and in fp64 differ by {noise['fp32_vs_fp64']} (limit {GATE}), as when "
            f"two experts tie and rounding picks one; try another _inputs_seed in toy_models/rows/{row}.json"
        )
    gradient_noise = _three_digits(worst_difference(gradients, exact_gradients))
    gradient_gate = max(GATE, _three_digits(NOISE_FACTOR * gradient_noise))
    if gradient_gate > GRADIENT_GATE_LIMIT:
        raise UndecidedError(
            f"row {row}: HF's gradients in fp32 and in fp64 differ by {gradient_noise} in some tensor, too much for "
            f"a gate of {GRADIENT_GATE_LIMIT}; try another _inputs_seed in toy_models/rows/{row}.json"
        )
    tensors = {"inputs": ids, **found, "gradients": fingerprints(gradients)}
    provenance = {
        "row": row,
        "config_hash": hash_config(toy_models.golden_key(row)),
        "weights_hash": toy_models.weights_hash(model),
        "tensors_hash": toy_models.weights_hash(tensors),
        "seed": toy_models.SEED,
        "versions": {library: version(library) for library in LIBRARIES},
        "command": command,
        "reason": reason,
        "noise": noise,
        "gate": max(GATE, _three_digits(NOISE_FACTOR * max(noise.values()))),
        "gradient_noise": gradient_noise,
        "gradient_gate": gradient_gate,
    }
    return Golden(row, tensors, provenance)


def live(row: str) -> Golden:
    """Compute the golden of a guest row, on the first inputs of SEEDS_TRIED on which the reference is decided; nothing is
    written. UndecidedError when there are none."""
    for seed in range(SEEDS_TRIED):
        toy_models.amend_guest(row, _inputs_seed=seed)
        try:
            return compute(row, "live reference", "goldengate verify")
        except UndecidedError as error:
            undecided = error
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise LiveReferenceError(f"{row}: Hugging Face cannot compute the toy: {why[0]}") from error
    raise UndecidedError(f"on {SEEDS_TRIED} choices of inputs: {undecided}")


def to_bytes(golden: Golden) -> bytes:
    """Return a golden as its file holds it."""
    return save(golden.tensors, {"provenance": _canonical(golden.provenance)})


def regen(row: str, reason: str) -> Drift:
    """Make the row's golden anew, replace the file in one step, return the drift. Errors: see `compute`."""
    new = compute(row, reason, regen_command(row, reason))
    drift = _drift(new)
    temporary = path(row).parent / f".{row}.tmp"
    temporary.write_bytes(to_bytes(new))
    os.replace(temporary, path(row))
    return drift


def diff(row: str) -> Drift:
    """What `regen` would change, without writing. ValueError: see `compute`."""
    return _drift(compute(row, "comparison only", regen_command(row)))


def check_fresh(row: str, config_hash: str, weights_hash: str) -> str | None:
    """An error text if the row's golden was made from another config or other weights, else None."""
    provenance = load(row).provenance
    current = {"config": config_hash, "weights": weights_hash}
    stale = [what for what, value in current.items() if provenance[f"{what}_hash"] != value]
    if not stale:
        return None
    return (
        f"golden of row {row} is stale: it was made from another {' and other '.join(stale)}; "
        f"undo the change, or make it anew with: {regen_command(row)}"
    )


def _three_digits(value: float) -> float:
    """Noise is a size: its further digits would only make goldens differ from one machine to the next."""
    return float(f"{value:.2e}")


def reference_logits(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`logits` [batch, sequence, vocab] of a toy model and `mtp_logits_<k>` [batch, sequence - k, vocab] of its heads."""
    with torch.no_grad():
        found = {"logits": model(ids, use_cache=False).logits}
        heads = getattr(model, "mtp", None)
        extra = toy_models.mtp.logits(heads, model, ids) if heads is not None else []
    return found | {f"mtp_logits_{k}": tensor for k, tensor in enumerate(extra, start=1)}


def _drift(new: Golden) -> Drift:
    if not path(new.row).exists():
        return Drift(new.row, None, ())
    old = _read(new.row)
    hashes = ("config", "weights")
    changed = [what for what in hashes if old.provenance[f"{what}_hash"] != new.provenance[f"{what}_hash"]]
    if not torch.equal(old.inputs, new.inputs):
        changed.append("inputs")
    before, now = old.provenance["versions"], new.provenance["versions"]
    changed += [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    same_shape = old.logits.shape == new.logits.shape
    value = relative_rms(new.logits, old.logits) if same_shape else math.inf
    return Drift(new.row, value, tuple(changed))


def _read(row: str) -> Golden:
    try:
        with safe_open(path(row), "pt") as file:
            provenance = json.loads(file.metadata()["provenance"])
            golden = Golden(row, {name: file.get_tensor(name) for name in file.keys()}, provenance)  # noqa: SIM118
        _check_evidence(golden)
        return golden
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        message = f"{path(row)} is no golden ({error}); delete it, then: {regen_command(row)}"
        raise ValueError(message) from error


def _check_evidence(golden: Golden) -> None:
    """KeyError, TypeError or ValueError for provenance that lacks something, or whose limits do not follow from its noise: a
    limit that was edited would let anything pass."""
    said = golden.provenance
    for name in ("inputs", "logits", "gradients"):
        golden.tensors[name]
    for name in ("config_hash", "weights_hash", "tensors_hash", "command", "reason"):
        if not isinstance(said[name], str):
            raise TypeError(f"{name} is {said[name]!r}")
    if said["row"] != golden.row or not isinstance(said["versions"], dict) or said["seed"] != toy_models.SEED:
        raise ValueError(f"it says row {said['row']!r}, seed {said['seed']!r}, versions {said['versions']!r}")
    for name, noise in (("gate", max(said["noise"].values())), ("gradient_gate", said["gradient_noise"])):
        if not 0 <= noise <= 1:
            raise ValueError(f"noise of {noise!r} is none")
        if said[name] != (due := max(GATE, _three_digits(NOISE_FACTOR * noise))):
            raise ValueError(f"{name} is {said[name]!r}, and {due} follows from the noise")
    if said["gradient_gate"] > GRADIENT_GATE_LIMIT:
        raise ValueError(f"gradient_gate is {said['gradient_gate']}, over {GRADIENT_GATE_LIMIT}")


def _canonical(content: Mapping) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


class _Double(TorchFunctionMode):
    """Inside it, a request for float32 gives float64.

    HF computes norms, softmax, rotary angles and routers in float32 whatever the model's dtype, so a model
    of float64 weights alone would share much of its rounding with the float32 one and the noise would look
    small.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        double = {torch.float32: torch.float64, torch.Tensor.float: torch.Tensor.double}

        def swap(value):
            return double.get(value, value) if isinstance(value, torch.dtype) else value

        kwargs = {key: swap(value) for key, value in (kwargs or {}).items()}
        return double.get(func, func)(*map(swap, args), **kwargs)
