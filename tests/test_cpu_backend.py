"""The CPU backend: its substitutions are where Megatron looks, and its modules compute what torch's own do."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from bridges import GPTModelProvider, Layout
from bridges.providers import cpu_substitutions
from bridges.providers.core_attention import CoreAttention, zigzag_positions
from bridges.providers.cpu_backend import (
    ColumnLinear,
    DuplicatedLinear,
    GroupedLinear,
    LayerNormColumnLinear,
    Norm,
    RowLinear,
)
from bridges.providers.groups import ensure_process_groups
from harness.ranks import jobs
from tests.bounds import assert_apart, assert_same, roundings

# -- substitutions -------------------------------------------------------------------------------------------------------

# Where Megatron looks each torch function up, at the time of the call: (module of megatron.core, function).
TORCH_USERS = {
    "current_device": ("tensor_parallel.mappings", "_gather_along_first_dim"),
    "set_device": ("dist_checkpointing.strategies.async_utils", "PersistentAsyncCaller.async_loop"),
    "synchronize": ("pipeline_parallel.p2p_communication", "P2PCommunicator._communicate"),
    "Stream": ("transformer.moe.token_dispatcher", "MoEAlltoAllTokenDispatcher.__init__"),
    "Event": ("transformer.moe.moe_layer", "MoELayer.setup_delayed_wgrad_for_dispatch_backward_overlap"),
    "current_stream": ("transformer.moe.token_dispatcher", "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize"),
    "stream": ("transformer.moe.token_dispatcher", "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize"),
    "get_rng_state": ("tensor_parallel.random", "CudaRNGStatesTracker.add"),
    "set_rng_state": ("rerun_state_machine", "RerunStateMachine._restore_state"),
    "manual_seed": ("tensor_parallel.random", "CudaRNGStatesTracker.add"),
    "all_gather": ("tensor_parallel.mappings", "_gather_along_first_dim"),
    "reduce_scatter": ("tensor_parallel.mappings", "_reduce_scatter_along_first_dim"),
}


@cache
def source(module: str) -> ast.Module:
    """A module's syntax tree, from its file: what is there does not depend on what was already replaced."""
    return ast.parse(Path(importlib.util.find_spec(module).origin).read_text())


def names_bound(tree: ast.Module) -> set[str]:
    """Names that a module defines or imports for itself, also inside try and if."""
    found, todo = set(), list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Try | ast.If):
            todo += [*node.body, *node.orelse, *(s for h in getattr(node, "handlers", ()) for s in h.body)]
    return found


def functions(tree: ast.AST, prefix: str = "") -> dict[str, ast.FunctionDef]:
    """Every function by its dotted name."""
    found = {}
    for node in ast.iter_child_nodes(tree):
        name = prefix + node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else prefix.removesuffix(".")
        if isinstance(node, ast.FunctionDef):
            found[name] = node
        found |= functions(node, name + "." if name else "")
    return found


def test_every_torch_function_replaced_is_torchs_and_megatrons():
    """torch has it, and Megatron still calls it by that name where the table says. A new substitution needs a line in
    the table; one that Megatron no longer uses can go."""
    for name in cpu_substitutions.TORCH_CUDA:
        assert name in torch.cuda.__all__
    for name in cpu_substitutions.TORCH_DISTRIBUTED:
        assert name in torch.distributed.distributed_c10d.__all__
    replaced = {
        **dict.fromkeys(cpu_substitutions.TORCH_CUDA, "torch.cuda"),
        **dict.fromkeys(cpu_substitutions.TORCH_DISTRIBUTED, "torch.distributed"),
    }
    assert set(TORCH_USERS) == set(replaced)
    for name, (module, function) in TORCH_USERS.items():
        body = functions(source(f"megatron.core.{module}"))[function]
        calls = {ast.unparse(node.func) for node in ast.walk(body) if isinstance(node, ast.Call)}
        assert f"{replaced[name]}.{name}" in calls, f"{module}.{function} no longer calls {replaced[name]}.{name}"


def makers_of_cuda(module: str) -> set[str]:
    """Functions of torch that the module calls with the literal device "cuda" or with pinned memory."""
    calls = [node for node in ast.walk(source(module)) if isinstance(node, ast.Call)]
    names = [
        ast.unparse(call.func)
        for call in calls
        if {ast.unparse(word) for word in call.keywords} & {"device='cuda'", "pin_memory=True"}
    ]
    return {name.removeprefix("torch.") for name in names if name.startswith("torch.")}


@pytest.mark.parametrize("module", cpu_substitutions.LITERAL_CUDA)
def test_modules_that_see_another_torch_need_it(module):
    """They still name the device, and in functions that are replaced."""
    made = makers_of_cuda(module)
    assert made, f"{module} names no device any more: take it off the list"
    assert made <= set(cpu_substitutions.TorchOnCpu.MAKERS)


def test_a_module_that_names_no_device_is_told():
    assert not makers_of_cuda("megatron.core.models.gpt.gpt_model")


def looked_up(module: str, name: str) -> bool:
    """Does a function read `name` from the module's globals, or import it from the module when it runs?"""
    for function in functions(source(module)).values():
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id == name:
                return True
    here = Path(importlib.util.find_spec("megatron.core").origin).parent
    for file in (*here.glob("models/*.py"), *here.glob("models/gpt/*.py"), *here.glob("transformer/*.py")):
        if name in (text := file.read_text()) and module in text:
            for function in functions(ast.parse(text)).values():
                for node in ast.walk(function):
                    if (
                        isinstance(node, ast.ImportFrom)
                        and node.module == module
                        and name in {a.name for a in node.names}
                    ):
                        return True
    return False


@pytest.mark.parametrize(("module", "name"), list(cpu_substitutions._megatron_symbols()), ids=lambda value: value)
def test_every_megatron_symbol_replaced_is_there_and_looked_up_there(module, name):
    """The installed Megatron binds the name in that module, and functions read it from there when they are called. A
    rename upstream fails here instead of leaving a substitution without effect."""
    assert name in names_bound(source(module)), f"{module} does not define or import {name}"
    assert looked_up(module, name), f"nothing looks {name} up in {module}"


def test_looked_up_tells_a_symbol_that_nobody_reads():
    """The guard above can fail: an unknown name, and one that is imported but used by no function."""
    assert "TESpecialProvider" not in names_bound(source("megatron.core.models.gpt.gpt_layer_specs"))
    assert not looked_up("megatron.core.models.gpt.gpt_layer_specs", "TESpecialProvider")
    assert not looked_up("megatron.core.models.gpt.gpt_layer_specs", "HAVE_APEX_")


def replaced_now() -> list:
    return (
        [getattr(torch.cuda, name) for name in cpu_substitutions.TORCH_CUDA]
        + [getattr(torch.distributed, name) for name in cpu_substitutions.TORCH_DISTRIBUTED]
        + [importlib.import_module(module).torch for module in cpu_substitutions.LITERAL_CUDA]
        + [torch.Tensor.cuda]
    )


def test_install_refuses_where_there_is_a_gpu(monkeypatch):
    """It says so and replaces nothing."""
    monkeypatch.setattr(cpu_substitutions, "_undo", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(cpu_substitutions.TORCH_CUDA, "set_device", lambda device: "another")
    before = replaced_now()
    with pytest.raises(RuntimeError, match="a GPU is present"):
        cpu_substitutions.install()
    assert all(a is b for a, b in zip(replaced_now(), before, strict=True))
    assert cpu_substitutions._undo is None


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the substitutions refuse where there is a GPU")


@needs_no_gpu
def test_install_is_idempotent():
    """The second time does nothing: the same functions."""
    cpu_substitutions.install()
    before = replaced_now()
    cpu_substitutions.install()
    assert all(a is b for a, b in zip(replaced_now(), before, strict=True))


@needs_no_gpu
def test_install_says_which_symbol_is_gone(monkeypatch):
    """As it would with another megatron-core."""
    monkeypatch.setattr(cpu_substitutions, "_undo", None)
    monkeypatch.setattr(
        cpu_substitutions, "_megatron_symbols", lambda: {("megatron.core.utils", "no_such_thing"): None}
    )
    with pytest.raises(RuntimeError, match=r"megatron\.core\.utils\.no_such_thing is gone from megatron-core \d"):
        cpu_substitutions.install()


@needs_no_gpu
def test_installed_cuda_means_cpu():
    """Where Megatron names it: devices named cuda, .cuda() and pinned memory give plain CPU tensors; streams and events do
    nothing. Elsewhere torch is as it was."""
    cpu_substitutions.install()
    theirs = importlib.import_module(cpu_substitutions.LITERAL_CUDA[0]).torch
    tensor = theirs.zeros(2, device="cuda", pin_memory=True)
    assert tensor.device.type == "cpu"
    assert theirs.tensor([1], device="meta").device.type == "meta"
    assert theirs.Tensor is torch.Tensor
    assert tensor.cuda(non_blocking=True) is tensor
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")
    assert torch.cuda.current_device() == torch.device("cpu")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_event(torch.cuda.Event())
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@needs_no_gpu
def test_installed_nothing_is_compiled():
    """Megatron's compiled helpers (the router's count of tokens per expert) run as they are written."""
    cpu_substitutions.install()

    def refuse(*_):
        raise AssertionError("the compiler was called")

    assert torch.compile(lambda x: x + 1, backend=refuse)(torch.zeros(1)).item() == 1


# -- collectives that gloo has only in part ------------------------------------------------------------------------------


def gather_unequal(lengths: list[int], subgroup: list[int] | None) -> list[list[float]] | None:
    rank = torch.distributed.get_rank()
    group = torch.distributed.new_group(subgroup) if subgroup else None
    members = subgroup or list(range(torch.distributed.get_world_size()))
    if rank not in members:
        return None
    mine = torch.full((lengths[members.index(rank)], 2), float(rank))
    outputs = [torch.full((n, 2), -1.0) for n in lengths]
    torch.distributed.all_gather(outputs, mine, group=group)
    return [o.flatten().tolist() for o in outputs]


@pytest.mark.parametrize(
    ("lengths", "subgroup"), [([2, 2], None), ([3, 1], None), ([0, 2], None), ([1, 4, 2, 0], None), ([1, 3], [1, 3])]
)
def test_all_gather_of_unequal_lengths(lengths, subgroup, ranks):
    """As NCCL does it: every rank gets every rank's tensor, also an empty one, also in a part of the world."""
    members = subgroup or list(range(len(lengths)))
    world = 4 if subgroup else len(lengths)
    found = ranks.run(world, gather_unequal, lengths, subgroup)
    expected = [[float(rank)] * (2 * n) for rank, n in zip(members, lengths, strict=True)]
    assert found == [expected if rank in members else None for rank in range(world)]


def scatter_sum(lengths: list[int], subgroup: list[int] | None) -> list[float] | None:
    rank = torch.distributed.get_rank()
    group = torch.distributed.new_group(subgroup) if subgroup else None
    members = subgroup or list(range(torch.distributed.get_world_size()))
    if rank not in members:
        return None
    inputs = [torch.full((n,), float(10**i * (rank + 1))) for i, n in enumerate(lengths)]
    kept = [x.clone() for x in inputs]
    output = torch.full((lengths[members.index(rank)],), -1.0)
    torch.distributed.reduce_scatter(output, inputs, group=group)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    return output.tolist()


@pytest.mark.parametrize(
    ("lengths", "subgroup"), [([2, 2], None), ([3, 1], None), ([1, 0, 2, 2], None), ([2, 3], [1, 3])]
)
def test_reduce_scatter_of_a_list(lengths, subgroup, ranks):
    """Each rank gets the sum of what all ranks hold for it; the inputs stay as they were."""
    members = subgroup or list(range(len(lengths)))
    world = 4 if subgroup else len(lengths)
    total = sum(rank + 1 for rank in members)
    expected = [[float(10**i * total)] * n for i, n in enumerate(lengths)]
    found = ranks.run(world, scatter_sum, lengths, subgroup)
    assert found == [expected[members.index(rank)] if rank in members else None for rank in range(world)]


# -- norms -----------------------------------------------------------------------------------------------------------------


def config(**fields) -> GPTModelProvider:
    return GPTModelProvider(
        **{"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, **fields}
    )


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 16), (torch.bfloat16, 1)])
def test_norm_is_torchs(kind, zero_centered, dtype, steps):
    """RMSNorm and LayerNorm with random weights and an eps that counts; a zero-centred weight stores gamma - 1.
    In bf16 the result alone is rounded, once."""
    norm = Norm(
        config(normalization=kind, layernorm_zero_centered_gamma=zero_centered, params_dtype=dtype), 16, eps=0.1
    )
    reference = (torch.nn.RMSNorm if kind == "RMSNorm" else torch.nn.LayerNorm)(16, eps=0.1)
    assert {n for n, _ in norm.named_parameters()} == {n for n, _ in reference.named_parameters()}
    with torch.no_grad():
        norm.weight.copy_(randn(16, seed=1))
        reference.weight.copy_(norm.weight.float() + zero_centered)
        if kind == "LayerNorm":
            norm.bias.copy_(randn(16, seed=2))
            reference.bias.copy_(norm.bias)
        x = randn(3, 2, 16, dtype=dtype)
        found, expected = norm(x), reference(x.float())
    assert found.dtype == dtype
    assert_same(found.float(), expected, roundings(dtype, steps))


def test_norm_takes_statistics_in_fp32():
    """bf16 inputs whose squares bf16 cannot hold apart."""
    x = (1 + randn(1, 4096) / 256).bfloat16()
    norm = Norm(config(params_dtype=torch.bfloat16), 4096)
    assert torch.equal(norm(x), F.rms_norm(x.float(), (4096,), eps=1e-5).bfloat16())


def test_norm_refuses_a_kind_it_does_not_know():
    """Not silently RMSNorm."""
    with pytest.raises(ValueError, match=r"'BatchNorm': RMSNorm or LayerNorm"):
        Norm(config(normalization="BatchNorm"), 16)


# -- attention -----------------------------------------------------------------------------------------------------------


def group(rank: int = 0, size: int = 1) -> SimpleNamespace:
    """A process group that needs no processes."""
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def groups(**named) -> SimpleNamespace:
    return SimpleNamespace(
        **{"tp": group(), "cp": group(), "ep": group(), "expt_tp": group(), "expt_dp": group(), **named}
    )


def core_attention(pg=None, layer: int = 1, k: int = 8, v: int | None = None, sinks=None, **fields) -> CoreAttention:
    provider = config(kv_channels=k, softmax_type="vanilla" if sinks is None else "learnable", **fields)
    attention = CoreAttention(provider, layer, None, "self", k_channels=k, v_channels=v, pg_collection=pg or groups())
    if sinks is not None:
        attention.softmax_offset.data.copy_(sinks)
    return attention


def visible(length: int, window: int | None) -> torch.Tensor:
    """Hugging Face's mask [s, s], spelled out: a token sees itself and the window - 1 tokens before it."""
    return torch.tensor(
        [[i - j >= 0 and (window is None or i - j < window) for j in range(length)] for i in range(length)]
    )


def reference(q, k, v, window=None, sinks=None, scale=None) -> torch.Tensor:
    """Attention with an explicit mask: torch's own, or with sinks a plain softmax with one more column."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b n s d]
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    mask = visible(q.size(2), window)
    if sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = (q @ k.transpose(-1, -2)) * q.size(-1) ** -0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        out = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ v
    return out.permute(2, 0, 1, 3).flatten(2)


def qkv(length: int = 12, heads: int = 4, kv_heads: int = 2, d: int = 8, e: int | None = None):
    return (
        randn(length, 2, heads, d, seed=1),
        randn(length, 2, kv_heads, d, seed=2),
        randn(length, 2, kv_heads, e or d, seed=3),
    )


@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attention_is_torchs(heads, kv_heads, window):
    """Grouped queries, causal, with Hugging Face's window W given as Megatron's (W - 1, 0)."""
    q, k, v = qkv(heads=heads, kv_heads=kv_heads)
    megatron = None if window is None else (window - 1, 0)
    found = core_attention(window_size=megatron)(q, k, v, None)
    assert_same(found, reference(q, k, v, window))
    if window == 5:  # off by one would show
        assert_apart(found, reference(q, k, v, 6))
        assert_apart(found, reference(q, k, v, 4))


@pytest.mark.parametrize("e", [4, 8, 20])
def test_keys_and_values_may_have_different_widths(e):
    """As latent attention has them: out [s, b, n x e], scaled by the keys' width."""
    q, k, v = qkv(e=e)
    found = core_attention(v=e)(q, k, v, None)
    assert found.shape == (12, 2, 4 * e)
    assert_same(found, reference(q, k, v))


def test_the_scale_can_be_given():
    """softmax_scale in place of 1 / sqrt(d)."""
    q, k, v = qkv()
    attention = CoreAttention(config(kv_channels=8), 1, None, "self", softmax_scale=0.7, pg_collection=groups())
    assert_same(attention(q, k, v, None), reference(q, k, v, scale=0.7))


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_take_part_in_the_softmax_and_have_no_value(window):
    """Against a plain softmax with one more column, per head."""
    q, k, v = qkv()
    sinks = randn(4, seed=4) * 2
    megatron = None if window is None else (window - 1, 0)
    found = core_attention(sinks=sinks, window_size=megatron)(q, k, v, None)
    assert_same(found, reference(q, k, v, window, sinks))
    assert_apart(found, reference(q, k, v, window))


def test_layers_have_the_window_that_the_frequency_gives_them():
    """window_attn_skip_freq: 1 where the layer (counted from one) has the window."""
    q, k, v = qkv()
    fields = {"window_size": (2, 0), "window_attn_skip_freq": [1, 0]}
    assert_same(core_attention(layer=1, **fields)(q, k, v, None), reference(q, k, v, 3))
    assert_same(core_attention(layer=2, **fields)(q, k, v, None), reference(q, k, v))


def test_attention_refuses_what_it_does_not_build():
    """Packed sequences, biases and other softmax types are errors."""
    q, k, v = qkv()
    with pytest.raises(ValueError, match="packed sequences and attention biases"):
        core_attention()(q, k, v, None, packed_seq_params=object())
    with pytest.raises(ValueError, match="packed sequences and attention biases"):
        core_attention()(q, k, v, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="softmax_type 'off-by-one'"):
        CoreAttention(config(softmax_type="off-by-one"), 1, None, "self", pg_collection=groups())


def attention_with_grads(q, k, v, sinks, pg, window) -> tuple[torch.Tensor, ...]:
    """(output, gradients of q, k, v and the sinks) for the loss sum(output^2)."""
    attention = core_attention(pg, sinks=sinks, window_size=window)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, None)
    out.square().sum().backward()
    grad = [] if sinks is None else [attention.softmax_offset.grad]
    return (out.detach(), q.grad, k.grad, v.grad, *grad)


def attention_on_a_rank(text: str, sinks: torch.Tensor | None, window: tuple[int, int] | None) -> list:
    """This rank's tokens and heads of the same q, k and v: outputs and gradients as arrays."""
    layout = Layout.parse(text)
    jobs.use_layout(layout)
    ensure_process_groups(config().apply_layout(layout), layout)
    pg = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    positions = zigzag_positions(12 // layout.cp, pg.cp.rank(), layout.cp)
    local = [x[positions].chunk(layout.tp, dim=2)[pg.tp.rank()] for x in qkv()]
    mine = None if sinks is None else sinks.chunk(layout.tp)[pg.tp.rank()]
    return [x.numpy() for x in attention_with_grads(*local, mine, pg, window)]


@pytest.mark.parametrize("window", [None, (3, 0)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("text", ["tp2", "cp2", "tp2-cp2"])
def test_attention_in_parallel_is_attention_on_one_rank(text, with_sinks, window, ranks):
    """Outputs and gradients of all ranks, put together, are those of one rank: heads over TP, zig-zag tokens over CP
    (groups that do not start at rank 0 among them)."""
    layout, sinks = Layout.parse(text), randn(4, seed=4) if with_sinks else None
    expected = attention_with_grads(*qkv(), sinks, groups(), window)
    ranks.use_for(layout)
    found = ranks.run(layout.world_size, attention_on_a_rank, text, sinks, window)
    heads = expected[0].view(12, 2, 4, 8), *expected[1:4]
    for i, whole in enumerate(heads):
        together = torch.full_like(whole, float("nan"))
        for rank, results in enumerate(found):
            at = layout.coords(rank)
            rows = zigzag_positions(12 // layout.cp, at.cp, layout.cp)
            size = whole.size(2) // layout.tp
            local = torch.from_numpy(results[i]).view(len(rows), 2, size, whole.size(3))
            together[rows, :, at.tp * size : (at.tp + 1) * size] = local
        assert_same(together, whole)
    if with_sinks:  # each CP rank has the gradient of its own tokens; Megatron sums them over its groups
        parts = torch.zeros(layout.tp, 4 // layout.tp)
        for rank, results in enumerate(found):
            parts[layout.coords(rank).tp] += torch.from_numpy(results[4])
        assert_same(parts.flatten(), expected[4])


# -- linears -------------------------------------------------------------------------------------------------------------


def block_on_a_rank(text: str, normalization: str) -> tuple[list, list]:
    """A norm, a column-parallel and a row-parallel linear with biases, on this rank: output and gradient of the input."""
    layout = Layout.parse(text)
    jobs.use_layout(layout)
    provider = config(normalization=normalization, add_bias_linear=True, vocab_size=8).apply_layout(layout).finalize()
    ensure_process_groups(provider, layout)
    tp = parallel_state.get_tensor_model_parallel_group()
    shared = {"config": provider, "init_method": torch.nn.init.zeros_, "bias": True, "is_expert": False, "tp_group": tp}
    column = LayerNormColumnLinear(16, 24, gather_output=False, skip_bias_add=False, **shared)
    row = RowLinear(24, 16, input_is_parallel=True, skip_bias_add=False, **shared)
    with torch.no_grad():
        column.weight.copy_(randn(24, 16, seed=1).chunk(layout.tp)[tp.rank()])
        column.bias.copy_(randn(24, seed=2).chunk(layout.tp)[tp.rank()])
        column.layer_norm_weight.copy_(randn(16, seed=3))
        if normalization == "LayerNorm":
            column.layer_norm_bias.copy_(randn(16, seed=4))
        row.weight.copy_(randn(16, 24, seed=5).chunk(layout.tp, dim=1)[tp.rank()])
        row.bias.copy_(randn(16, seed=6))
    x = randn(8, 2, 16, seed=7)
    x = (x.chunk(layout.tp)[tp.rank()] if layout.sp else x).requires_grad_()
    out, _ = row(F.gelu(column(x)[0]))
    out.square().sum().backward()
    return out.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("text", ["tp1", "tp2", "tp2-sp", "tp4-sp"])
def test_linears_in_parallel_are_torchs_on_one_rank(text, normalization, ranks):
    """Norm, column, activation, row: output and input gradient against torch, with sequence parallel put together."""
    layout = Layout.parse(text)
    x = randn(8, 2, 16, seed=7).requires_grad_()
    norm = (
        F.rms_norm(x, (16,), randn(16, seed=3), 1e-5)
        if normalization == "RMSNorm"
        else F.layer_norm(x, (16,), randn(16, seed=3), randn(16, seed=4), 1e-5)
    )
    hidden = F.gelu(F.linear(norm, randn(24, 16, seed=1), randn(24, seed=2)))
    expected = F.linear(hidden, randn(16, 24, seed=5), randn(16, seed=6))
    expected.square().sum().backward()
    ranks.use_for(layout)
    found = ranks.run(layout.world_size, block_on_a_rank, text, normalization)
    for whole, parts in zip((expected.detach(), x.grad), zip(*found, strict=True), strict=True):
        parts = [torch.from_numpy(p) for p in parts]
        for together in [torch.cat(parts)] if layout.sp else parts:
            assert_same(together, whole)


def grouped(parallel_mode: str, etp: int = 1, rank: int = 0, bias: bool = False, skip: bool = False) -> GroupedLinear:
    """Three experts 6 -> 8 whose whole weights are the same for every size of expert tensor parallel."""
    linear = GroupedLinear(
        3,
        6,
        8,
        parallel_mode=parallel_mode,
        config=config(),
        bias=bias,
        skip_bias_add=skip,
        is_expert=True,
        pg_collection=groups(expt_tp=group(rank, etp)),
    )
    with torch.no_grad():
        for i in range(3):
            dim = 0 if parallel_mode == "column" else 1
            getattr(linear, f"weight{i}").copy_(randn(8, 6, seed=i).chunk(etp, dim)[rank])
            if bias:
                getattr(linear, f"bias{i}").copy_(
                    randn(8, seed=10 + i).chunk(etp if parallel_mode == "column" else 1)[0]
                )
    return linear


@pytest.mark.parametrize("counts", [[2, 3, 4], [0, 9, 0], [9, 0, 0], [0, 0, 0]])
@pytest.mark.parametrize("mode", ["column", "row"])
def test_grouped_linear_is_a_loop_over_experts(mode, counts):
    """Token by token with the weight and bias of its expert, experts without tokens among them."""
    x = randn(sum(counts), 6, seed=5)
    linear = grouped(mode, bias=True)
    expected, start = [], 0
    for i, count in enumerate(counts):
        for token in x[start : start + count]:
            expected.append(randn(8, 6, seed=i) @ token + randn(8, seed=10 + i))
        start += count
    found, rest = linear(x, counts)
    assert rest is None
    assert found.shape == (sum(counts), 8)
    if expected:
        assert_same(found, torch.stack(expected))


def test_grouped_linear_may_leave_its_biases_to_the_caller():
    """skip_bias_add: the biases come back beside the output."""
    x = randn(9, 6, seed=5)
    found, biases = grouped("row", bias=True, skip=True)(x, [2, 3, 4])
    assert_same(found, grouped("row")(x, [2, 3, 4])[0])
    assert torch.equal(torch.stack(list(biases)), torch.stack([randn(8, seed=10 + i) for i in range(3)]))


def test_grouped_linear_under_expert_tensor_parallel():
    """Column shards side by side, row shards summed, are the whole."""
    x = randn(9, 6, seed=5)
    whole, _ = grouped("column")(x, [2, 3, 4])
    columns = [grouped("column", 2, rank)(x, [2, 3, 4])[0] for rank in range(2)]
    rows = [grouped("row", 2, rank)(x.chunk(2, dim=1)[rank], [2, 3, 4])[0] for rank in range(2)]
    assert_same(torch.cat(columns, dim=1), whole)
    assert_same(sum(rows), whole)


# -- names ---------------------------------------------------------------------------------------------------------------

# What Transformer Engine's modules call their parameters.
TE_NAMES = {
    "LayerNormLinear": {"weight", "bias", "layer_norm_weight", "layer_norm_bias"},
    "Linear": {"weight", "bias"},
    "GroupedLinear": {"weight0", "weight1", "bias0", "bias1"},
    "LayerNorm": {"weight", "bias"},
    "RMSNorm": {"weight"},
    "DotProductAttention": {"softmax_offset"},
}


def names_of_ours() -> dict[str, set[str]]:
    """On a rank: parameter names of our modules, under the names of those they stand for."""
    jobs.use_layout(Layout())
    provider = config(normalization="LayerNorm", add_bias_linear=True, vocab_size=8).finalize()
    ensure_process_groups(provider)
    tp = parallel_state.get_tensor_model_parallel_group()
    shared = {"config": provider, "init_method": torch.nn.init.zeros_, "bias": True, "is_expert": False, "tp_group": tp}
    linears = [
        ColumnLinear(16, 24, gather_output=False, **shared),
        RowLinear(24, 16, input_is_parallel=True, skip_bias_add=False, **shared),
        DuplicatedLinear(16, 24, config=provider, bias=True),
    ]
    assert len({frozenset(n for n, _ in linear.named_parameters()) for linear in linears}) == 1
    ours = {
        "LayerNormLinear": LayerNormColumnLinear(16, 24, gather_output=False, **shared),
        "Linear": linears[0],
        "GroupedLinear": GroupedLinear(
            2,
            6,
            8,
            parallel_mode="column",
            config=provider,
            bias=True,
            skip_bias_add=False,
            is_expert=True,
            pg_collection=groups(),
        ),
        "LayerNorm": Norm(provider, 16),
        "RMSNorm": Norm(config(), 16),
        "DotProductAttention": core_attention(sinks=torch.zeros(4)),
    }
    return {kind: {name for name, _ in module.named_parameters()} for kind, module in ours.items()}


def test_parameters_are_called_what_transformer_engine_calls_them(ranks):
    """One mapping table serves CPU and GPU because the names are the same."""
    assert ranks.run(1, names_of_ours) == [TE_NAMES]


def test_transformer_engine_still_calls_them_so():
    """The table above against the installed Transformer Engine."""
    try:
        import transformer_engine.pytorch as te
    except Exception as error:
        pytest.skip(f"transformer_engine cannot be imported: {type(error).__name__}: {error}")
    theirs = {
        "LayerNormLinear": te.LayerNormLinear(16, 24, normalization="LayerNorm", device="meta"),
        "Linear": te.Linear(16, 24, device="meta"),
        "GroupedLinear": te.GroupedLinear(2, 16, 24, device="meta"),
        "LayerNorm": te.LayerNorm(16, device="meta"),
        "RMSNorm": te.RMSNorm(16, device="meta"),
        "DotProductAttention": te.DotProductAttention(4, 16, softmax_type="learnable"),
    }
    assert {kind: {name for name, _ in module.named_parameters()} for kind, module in theirs.items()} == TE_NAMES


@needs_no_gpu
def test_what_is_installed_can_be_taken_back(monkeypatch):
    """Also when the installation fails half-way: every symbol is the one that it was."""
    monkeypatch.setattr(cpu_substitutions, "_undo", None)
    before = replaced_now()
    with cpu_substitutions.installed():
        assert torch.cuda.current_device() == torch.device("cpu")
        changed = replaced_now()
    assert all(a is b for a, b in zip(replaced_now(), before, strict=True))
    assert not all(a is b for a, b in zip(changed, before, strict=True))
    symbols = {**cpu_substitutions._megatron_symbols(), ("megatron.core.utils", "no_such_thing"): None}
    monkeypatch.setattr(cpu_substitutions, "_megatron_symbols", lambda: symbols)
    with pytest.raises(RuntimeError, match="no_such_thing"):
        cpu_substitutions.install()
    assert all(a is b for a, b in zip(replaced_now(), before, strict=True))
