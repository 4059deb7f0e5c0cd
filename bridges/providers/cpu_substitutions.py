"""What makes Megatron-Core run on a machine without a GPU: a small, listed set of substitutions.

`install()` is idempotent and refuses where CUDA is available. Every Megatron symbol replaced here is guarded by
tests/test_cpu_backend.py, which fails when Megatron no longer has it or no longer looks it up there.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("goldengate")


class _Nothing:
    """Stands for a CUDA stream or event: every method does nothing and gives itself."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


_NOTHING = _Nothing()

# torch.cuda functions on Megatron's path -> what they do here.
TORCH_CUDA: dict[str, Any] = {
    "current_device": lambda: torch.device("cpu"),
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "Stream": _Nothing,
    "Event": _Nothing,
    "current_stream": lambda device=None: _NOTHING,
    "stream": lambda stream: nullcontext(),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.manual_seed(seed),
}


def _all_gather(outputs, tensor, group=None, async_op=False, *, original=torch.distributed.all_gather):
    """NCCL gathers tensors of unequal lengths, gloo does not: pad to the longest."""
    longest = max(o.size(0) for o in outputs)
    if all(o.size(0) == longest for o in outputs):
        return original(outputs, tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.size(0)] = tensor
    whole = [torch.empty_like(padded) for _ in outputs]
    original(whole, padded, group=group)
    for output, piece in zip(outputs, whole, strict=True):
        output.copy_(piece[: output.size(0)])
    return _Done() if async_op else None


def _reduce_scatter(output, inputs, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
    """Gloo has no reduce_scatter of a list: reduce all of it and keep this rank's piece."""
    whole = torch.cat(inputs)
    torch.distributed.all_reduce(whole, op=op, group=group)
    output.copy_(whole.split([i.size(0) for i in inputs])[torch.distributed.get_rank(group)])
    return _Done() if async_op else None


class _Done:
    """What a collective with async_op gives when it is over already."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


# torch.distributed functions that gloo has only in part.
TORCH_DISTRIBUTED: dict[str, Any] = {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter}


def _numpy_split_sizes(tensor, as_numpy: bool = False, record_stream: bool = False):
    """Megatron leaves CPU tensors alone here, but torch's all_to_all wants its split sizes as numbers."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _megatron_symbols() -> dict[tuple[str, str], Any]:
    """(module, attribute) -> replacement, for Megatron's own look-ups."""
    from bridges.providers.cpu_backend import CPUSpecProvider, DuplicatedLinear, Norm, l2norm

    core = "megatron.core"
    return {
        # Megatron's GPT specs ask these names for Transformer Engine's modules.
        (f"{core}.models.gpt.gpt_layer_specs", "TESpecProvider"): CPUSpecProvider,
        (f"{core}.models.gpt.gpt_layer_specs", "TENorm"): Norm,
        (f"{core}.models.gpt.moe_module_specs", "TESpecProvider"): CPUSpecProvider,
        (f"{core}.extensions.transformer_engine_spec_provider", "TESpecProvider"): CPUSpecProvider,
        (f"{core}.transformer.multi_latent_attention", "TELinear"): DuplicatedLinear,
        # Gated delta nets: the layer specs insist on Transformer Engine, the module on fla, of which its plain PyTorch path
        # (deterministic_mode) uses this one function.
        (
            f"{core}.models.gpt.experimental_attention_variant_module_specs",
            "_get_backend_spec_provider",
        ): lambda config: CPUSpecProvider(),
        (f"{core}.ssm.gated_delta_net.common", "HAVE_FLA"): True,
        (f"{core}.ssm.gated_delta_net.common", "l2norm"): l2norm,
        (
            f"{core}.tensor_parallel.random",
            "_get_cuda_rng_state",
        ): lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        (f"{core}.tensor_parallel.random", "_set_cuda_rng_state"): lambda state, device=-1, graph_safe=False: (
            torch.set_rng_state(state)
        ),
        (f"{core}.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"): _numpy_split_sizes,
    }


# Megatron's modules on our path that name the device "cuda", or pinned memory, in their own code.
LITERAL_CUDA = (
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.utils",
)


class TorchOnCpu(ModuleType):
    """torch as those modules see it: what they make on "cuda" or in pinned memory is made on the CPU.

    Only they see it. A mode that looks at every call of torch in the process would do the same and cost a third of it.
    """

    MAKERS = ("ones", "tensor", "zeros")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self.MAKERS:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(maker: Callable) -> Callable:
    @functools.wraps(maker)
    def make(*args, device: Any = None, pin_memory: bool = False, **kwargs):
        return maker(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return make


_undo: list[Callable[[], Any]] | None = None  # how to take back what is installed; None: nothing is


def install() -> None:
    """Make Megatron-Core build and run on the CPU of this process (and of those forked from it), until `uninstall`.

    Raises RuntimeError where a GPU is, and for a Megatron that no longer has one of the symbols, which is then named.
    """
    global _undo
    if _undo is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("a GPU is present: the CPU substitutions are for machines without one")
    undo: list[Callable[[], Any]] = []

    def put(home: Any, name: str, replacement: Any) -> None:
        own = name in vars(home)  # what a class inherits is uncovered again, not copied
        undo.append(partial(setattr, home, name, vars(home)[name]) if own else partial(delattr, home, name))
        setattr(home, name, replacement)

    try:
        for name, replacement in TORCH_CUDA.items():
            put(torch.cuda, name, replacement)
        for name, replacement in TORCH_DISTRIBUTED.items():
            put(torch.distributed, name, replacement)
        for (module, attribute), replacement in _megatron_symbols().items():
            home = importlib.import_module(module)
            if not hasattr(home, attribute):
                raise RuntimeError(
                    f"{module}.{attribute} is gone from megatron-core {version('megatron-core')}: the CPU backend needs "
                    "its new name"
                )
            put(home, attribute, replacement)
        on_cpu = TorchOnCpu()
        for module in LITERAL_CUDA:
            put(importlib.import_module(module), "torch", on_cpu)
        put(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)
        # Megatron compiles some of its small functions. Without a GPU that means a C++ compiler and ten seconds for each.
        torch.compiler.set_stance("force_eager")
        undo.append(partial(torch.compiler.set_stance, "default"))
    except BaseException:
        _take_back(undo)
        raise
    _undo = undo


def uninstall() -> None:
    """Leave torch and Megatron as they were before `install`; without one it does nothing."""
    global _undo
    if _undo is not None:
        _take_back(_undo)
        _undo = None


def _take_back(undo: list[Callable[[], Any]]) -> None:
    for one in reversed(undo):
        one()


@contextmanager
def installed() -> Iterator[None]:
    """Substitute while the context lasts, where no GPU is; what was installed before it stays."""
    mine = _undo is None and not torch.cuda.is_available()
    if mine:
        install()
    try:
        yield
    finally:
        if mine:
            uninstall()


def announce() -> None:
    """Install for good in a process that builds a model on a CPU, and say so once."""
    if _undo is None:
        install()
        logger.warning(
            "no GPU here: torch.cuda and Megatron-Core are substituted in this process, so that models run on the CPU "
            "(bridges.providers.cpu_substitutions.uninstall() takes it back)"
        )
