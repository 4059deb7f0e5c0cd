"""A case on this machine: its model with random weights, its inputs, one step of it, and what that step should cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from bridges import AutoBridge
from harness.bench.cases import INPUT_SETS, SEQUENCE, TOY_SEQUENCE, Case, Model
from harness.flops import Flops, flops


@dataclass(frozen=True)
class Machine:
    """Where cases run: real dims, bf16 and Transformer Engine on a GPU, toy dims in fp32 on a CPU."""

    device: torch.device
    toy: bool
    fused: bool  # use the fused kernels that a Model names

    @classmethod
    def here(cls, *, fused: bool = True) -> Machine:
        gpu = torch.cuda.is_available()
        return cls(torch.device("cuda" if gpu else "cpu"), toy=not gpu, fused=gpu and fused)

    @property
    def kernels(self) -> Any:
        return "torch" if self.toy else "fused"

    @property
    def sequence(self) -> int:
        return TOY_SEQUENCE if self.toy else SEQUENCE


@dataclass
class Built:
    """A model on the machine, and what it was built from."""

    model: Model
    machine: Machine
    provider: Any
    chunk: Any

    def count(self, convention: Any) -> Flops:
        machine = self.machine
        return flops(
            self.provider,
            seq=machine.sequence,
            batch=self.model.batch,
            convention=convention,
            kernels=machine.kernels,
        )

    def settings(self) -> dict[str, Any]:
        """Everything that decides how long a step takes, but for the device and the versions."""
        return {
            "config": self.model.config(toy=self.machine.toy),
            "sequence": self.machine.sequence,
            "batch": self.model.batch,
            "dtype": str(self.provider.params_dtype).removeprefix("torch."),
            "fused": self.model.fused if self.machine.fused else {},
            "input_sets": INPUT_SETS,
        }


def build(model: Model, machine: Machine) -> Built:
    """Through the bridge, with Megatron's own random initialisation; in training mode, as real steps are."""
    raw = model.config(toy=machine.toy)
    bridge = AutoBridge.from_hf_config(CONFIG_MAPPING[raw["model_type"]].from_dict(raw))
    provider: Any = bridge.to_megatron_provider(load_weights=False)
    for name, value in model.fused.items() if machine.fused else ():
        setattr(provider, name, value)
    if raw.get("num_nextn_predict_layers"):
        provider.mtp_num_layers = raw["num_nextn_predict_layers"]
    provider.finalize()
    [chunk] = provider.provide_distributed_model(wrap_with_ddp=False)
    return Built(model, machine, provider, chunk.train())


def selected(case: Case, counted: Flops) -> dict[str, int]:
    """FLOPs of the case by part: forward, or forward and backward."""
    found: dict[str, int] = {}
    for part in counted.parts:
        inside = case.place in (None, part.place) and (case.parts is None or part.name in case.parts)
        if inside and part.name not in case.without:
            found[part.name] = found.get(part.name, 0) + (part.total if case.backward else part.forward)
    return found


class Subject:
    """One case, ready to run: `step(i)` with input set i; `bytes` is what it moves at the least (see `_bytes`)."""

    def __init__(self, case: Case, built: Built):
        self.case, self.built = case, built
        device, chunk = built.machine.device, built.chunk
        self.module = chunk.get_submodule(case.module) if case.module else chunk
        generator = torch.Generator(device).manual_seed(0)

        def tokens() -> torch.Tensor:
            shape = (built.model.batch, built.machine.sequence)
            return torch.randint(built.provider.vocab_size, shape, generator=generator, device=device)

        positions = torch.arange(built.machine.sequence, device=device)[None].expand(built.model.batch, -1)
        self.inputs: list[tuple[tuple, dict[str, Any]]]
        self.inputs = [((tokens(), positions, None), {"labels": tokens()}) for _ in range(INPUT_SETS)]
        if case.module:
            self.inputs = [self._of_module(args, kwargs, generator) for args, kwargs in self.inputs]
        self.leaves = [hidden_of(args, kwargs) for args, kwargs in self.inputs] if case.module else []
        self.cotangent: torch.Tensor | None = None
        self.parameters = list(chunk.parameters())
        self.bytes = self._bytes()

    def _of_module(self, args: tuple, kwargs: dict, generator: torch.Generator) -> tuple[tuple, dict[str, Any]]:
        """What the model gives the module, with random hidden states [sequence, batch, hidden] of unit size."""
        found: list[tuple[tuple, dict]] = []
        hook: Callable = lambda module, args, kwargs: found.append((args, dict(kwargs)))  # noqa: E731
        handle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                self.built.chunk(*args, **kwargs)
        finally:
            handle.remove()
        [(args, kwargs)] = found
        like = hidden_of(args, kwargs)
        fresh = torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)
        fresh.requires_grad_(self.case.backward)
        return (args, {**kwargs, "hidden_states": fresh}) if "hidden_states" in kwargs else ((fresh, *args[1:]), kwargs)

    def step(self, i: int) -> None:
        args, kwargs = self.inputs[i]
        with torch.set_grad_enabled(self.case.backward):
            output = self.module(*args, **kwargs)
        if not self.case.backward:
            return
        output = output[0] if isinstance(output, tuple) else output
        if not self.case.module:
            output.mean().backward()
            return
        if self.cotangent is None:
            self.cotangent = torch.randn_like(output)
        output.backward(self.cotangent)

    def warm_up(self) -> None:
        """Every input set once: kernels compile and choose, and the parameters that get gradients are known."""
        for i in range(INPUT_SETS):
            self.step(i)
        self.parameters = [p for p in self.built.chunk.parameters() if p.grad is not None]
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """The next step writes gradients, it does not add to them."""
        for tensor in [*self.parameters, *self.leaves]:
            tensor.grad = None

    def _bytes(self) -> int:
        """Forward: each parameter of the module read once; each input read and each output written once, of every module
        inside that has none inside; and an input that no module gave (rope's, an activation's, a residual's) was written
        once, from as much. Backward: the parameters and these activations read once more, and a gradient for each of
        them: three times the forward in all."""
        moved = 0
        given: dict[int, torch.Tensor] = {}  # by address, and held: no two of them have the same

        def give(*values: Any) -> None:
            given.update({t.untyped_storage().data_ptr(): t for t in tensors(values)})

        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            nonlocal moved
            between = [t for t in tensors((args, kwargs)) if t.untyped_storage().data_ptr() not in given]
            moved += sum(t.nbytes for t in tensors((args, kwargs, output))) + 2 * sum(t.nbytes for t in between)
            give(args, kwargs, output)

        inner = [m for m in self.module.modules() if not list(m.children())]
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in inner]
        args, kwargs = self.inputs[0]
        give(args, kwargs, list(self.module.parameters()))
        try:
            with torch.no_grad():
                self.module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        moved += sum(p.nbytes for p in self.module.parameters())
        return 3 * moved if self.case.backward else moved


def hidden_of(args: tuple, kwargs: dict) -> torch.Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for one in value for tensor in tensors(one)]
