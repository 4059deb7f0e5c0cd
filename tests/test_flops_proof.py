"""The proof that `hardware` is what runs, in layouts, and what it must catch. For every row it is a cell: tests/test_cells.py."""

import pytest
import torch
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule
from torch.utils.flop_counter import FlopCounterMode

from bridges import Layout
from harness.checks.flops import cotangent_of, count_on_rank, differences, expected_table, place_and_part
from harness.checks.subject import Bench, Subject
from harness.flops import Run, blocks, flops, recurrent
from harness.flops import model as model_module
from harness.flops.counter import Counted, OpCounter, UncountedOp, counting
from harness.flops.run import Part
from harness.sweep import verify_rows


@pytest.mark.parametrize(
    ("row", "layout", "replicated"),
    [
        ("qwen2_moe", "tp2-sp", ""),
        ("qwen2_moe", "cp2", ""),
        ("qwen2_moe", "ep2", ""),
        ("kimi_k2", "tp2-pp2-ep2-etp1-sp", ""),
        ("deepseek_v3", "tp2-sp", ""),
        ("qwen3_next", "cp2", ""),
        ("llama3", "pp2-vpp2", ""),
        ("llama3", "tp4", ""),
        ("qwen2_moe", "tp2", "experts, router, shared_expert_gate"),
        ("kimi_k2", "tp4-ep2-etp2", "experts, mla_kv_down, mla_q_down, router"),
    ],
)
def test_the_sum_over_ranks_is_the_same_in_every_layout(row, layout, replicated, ranks):
    """Except for work that ranks repeat, which has a name; vocabulary padding depends on tp and is counted as it is."""
    (cell,) = verify_rows([row], which=[layout], checks=["flops"], ranks=ranks).cells
    assert cell.status == "pass", cell.detail
    assert cell.detail.partition("of them replicated: ")[2] == replicated


# -- a proof that can fail -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(ranks, tmp_path_factory):
    """qwen2_moe on one rank: (provider, batch, length, what was counted)."""
    subject = Subject.make("qwen2_moe", tmp_path_factory.mktemp("flops"))
    bench = Bench(subject, Layout.parse("tp1"), ranks, tmp_path_factory.mktemp("scratch"))
    bench.build()
    ((table, _),) = bench.run(count_on_rank, subject.golden.inputs.numpy(), cotangent_of(subject))
    provider = subject.auto_bridge.to_megatron_provider(load_weights=False).finalize()
    return provider, *subject.golden.inputs.shape, table


def against(counted, **changed) -> list[str]:
    """The differences when the formulas read a configuration with other fields."""
    provider, batch, length, table = counted
    before = {name: getattr(provider, name) for name in changed}
    for name, value in changed.items():
        object.__setattr__(provider, name, value)
    try:
        found = flops(provider, seq=length, batch=batch, convention="hardware")
    finally:
        for name, value in before.items():
            object.__setattr__(provider, name, value)
    return differences(expected_table(found.parts, tp=1, sp=False, replicas=1), table)


def test_the_untouched_formulas_agree(counted):
    """What the mutants below fail is not the path."""
    assert against(counted) == []


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"moe_layer_freq": 1}, "layers.0 dense_mlp forward: 0 by formula"),  # the dense layer forgotten
        ({"moe_router_topk": 1}, "experts forward"),
        ({"gated_linear_unit": False}, "dense_mlp forward"),
        ({"kv_channels": 8}, "core_attention forward"),
        ({"num_query_groups": 4}, "qkv forward"),
        ({"moe_shared_expert_gate": False}, "shared_expert_gate forward: 0 by formula"),
        ({"mtp_num_layers": 1}, "mtp_proj forward"),
        ({"vocab_size": 130}, None),  # padded_vocab_size follows: the head is one row short
    ],
)
def test_a_wrong_field_is_a_difference_with_a_name(counted, changed, parts):
    """Mistakes of public calculators, one field each."""
    found = against(counted, **changed)
    assert found
    assert parts is None or any(parts in line for line in found), found


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (lambda p: [x for x in p if x.name != "router"], "router"),  # left out by most public calculators
        (lambda p: [Part(x.name, x.place, x.forward, x.forward) if x.name == "qkv" else x for x in p], "qkv backward"),
        (
            lambda p: [Part(x.name, x.place, x.forward + 1, x.backward) if x.name == "o_proj" else x for x in p],
            "o_proj",
        ),
        (lambda p: [*p, Part("embedding", "output", 2, 4)], "embedding"),  # the look-up counted as a product
        (
            lambda p: [Part(x.name, x.place.replace("layers.3", "layers.4"), x.forward, x.backward) for x in p],
            "layers.3",
        ),
    ],
)
def test_a_wrong_formula_is_a_difference_with_a_name(counted, mutant, name):
    """One FLOP, one direction or one layer is enough."""
    provider, batch, length, table = counted
    parts = mutant(list(flops(provider, seq=length, batch=batch, convention="hardware").parts))
    found = differences(expected_table(tuple(parts), tp=1, sp=False, replicas=1), table)
    assert any(name in line for line in found), found


def test_the_causal_convention_is_not_what_this_cpu_runs(counted):
    """The proof tells conventions apart: half of the core attention is missing, and nothing else."""
    provider, batch, length, table = counted
    causal = flops(provider, seq=length, batch=batch, convention="causal")
    found = differences(expected_table(causal.parts, tp=1, sp=False, replicas=1), table)
    assert found
    assert all("core_attention" in line for line in found)


def test_a_cell_with_a_wrong_formula_fails(ranks, monkeypatch):
    """Through the check itself."""
    original = blocks.moe
    monkeypatch.setattr(model_module.blocks, "moe", lambda *a: [p for p in original(*a) if p.name != "router"])
    (cell,) = verify_rows(["mixtral"], which=["tp1"], checks=["flops"], ranks=ranks).cells
    assert cell.status == "fail"
    assert cell.value > 0
    assert "router" in cell.detail
    assert "and 12 more" in cell.detail  # 8 layers, forward and backward, 4 of 16 shown


def test_flops_in_a_module_that_is_no_part_are_an_error():
    """A new module must be given its part; it is not dropped."""
    one = Counted(8, "0.decoder.layers.2.self_attention.linear_new", "aten.mm", False)
    with pytest.raises(RuntimeError, match=r"8 FLOPs of aten.mm in module decoder.layers.2.self_attention.linear_new"):
        place_and_part(one, {"0.decoder.layers.2": 5}, "output_layer")
    with pytest.raises(RuntimeError, match="belong to no part"):
        place_and_part(Counted(8, "", "aten.mm", False), {}, "output_layer")
    with pytest.raises(RuntimeError, match="'output_layer' belong to no part"):
        place_and_part(Counted(8, "0.output_layer", "aten.mm", False), {}, "language_model.output_layer")
    assert place_and_part(Counted(8, "0.output_layer", "aten.mm", False), {}, "output_layer") == ("output", "logits")


# -- traps of the counter --------------------------------------------------------------------------------------------


def count(function, *tensors, backward=True) -> tuple[OpCounter, int]:
    """Our counter, and torch's count of the same."""
    with FlopCounterMode(display=False) as torchs:
        out = function(*tensors)
        if backward:
            out.sum().backward()
    with OpCounter() as ours:
        out = function(*tensors)
        if backward:
            out.sum().backward()
    return ours, torchs.get_total_flops()


def leaf(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_attention_kernel_of_the_cpu():
    """torch 2.11 counts it as 0; it is 2 products forward and 5 backward."""
    q, k, v = leaf(2, 3, 10, 8), leaf(2, 3, 12, 8), leaf(2, 3, 12, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        ours, torchs = count(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    assert torchs == 0
    assert ours.total == 7 * 2 * (2 * 3) * 10 * 12 * 8
    assert set(ours.corrections) == {
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    }


def test_grouped_products():
    """torch 2.11 counts them as 0."""
    a, b = torch.randn(32, 16, dtype=torch.bfloat16), torch.randn(2, 16, 8, dtype=torch.bfloat16)
    ends = torch.tensor([24, 32], dtype=torch.int32)
    ours, torchs = count(lambda: torch._grouped_mm(a, b, ends), backward=False)
    assert ours.total == 2 * 32 * 16 * 8
    assert torchs in (0, ours.total)


@pytest.mark.parametrize(
    ("function", "shapes", "flops_of_it"),
    [
        (torch.mv, [(6, 5), (5,)], 2 * 6 * 5),
        (torch.dot, [(7,), (7,)], 2 * 7),
        (torch.addmv, [(6,), (6, 5), (5,)], 2 * 6 * 5),
        (torch.addr, [(6, 5), (6,), (5,)], 2 * 6 * 5),
        (torch.addbmm, [(4, 5), (3, 4, 6), (3, 6, 5)], 2 * 3 * 4 * 6 * 5),
    ],
)
def test_small_products_that_torch_counts_as_nothing(function, shapes, flops_of_it):
    ours, torchs = count(function, *(torch.randn(s) for s in shapes), backward=False)
    assert (ours.total, torchs) == (flops_of_it, 0)


def test_triangular_solve():
    """n x n against n x m: n n m multiply-adds, halved by the triangle."""
    a, b = torch.eye(6), torch.randn(6, 4)
    ours, torchs = count(lambda: torch.linalg.solve_triangular(a, b, upper=False), backward=False)
    assert (ours.total, torchs) == (6 * 6 * 4, 0)


def test_backward_of_a_depthwise_convolution():
    """Forward exact; backward is twice that, and torch says (channels) times as much for the weight."""
    x, w = leaf(2, 40, 30), leaf(40, 1, 4)
    ours, torchs = count(lambda x, w: torch.nn.functional.conv1d(x, w, padding=3, groups=40), x, w)
    forward = 2 * 2 * 33 * 40 * 4
    assert ours.total == 3 * forward
    assert torchs == 2 * forward + 40 * forward
    assert ours.corrections == {"aten.convolution_backward": forward - 40 * forward}


def test_backward_of_a_plain_convolution_needs_no_correction():
    x, w = leaf(2, 6, 30), leaf(5, 6, 4)
    ours, torchs = count(torch.nn.functional.conv1d, x, w)
    assert ours.total == torchs
    assert not ours.corrections


def test_einsum_and_custom_autograd_functions():
    """Both go through the dispatcher: nothing is lost."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.t()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[override]
            x, w = ctx.saved_tensors
            return grad @ w, grad.t() @ x

    ours, torchs = count(Twice.apply, leaf(10, 6), leaf(5, 6))
    assert ours.total == torchs == 3 * 2 * 10 * 6 * 5
    ours, torchs = count(lambda q, k: torch.einsum("sbnd,tbnd->bnst", q, k), leaf(7, 2, 3, 4), leaf(9, 2, 3, 4))
    assert ours.total == torchs == 3 * 2 * 6 * 7 * 9 * 4


@torch.library.custom_op("goldengate_test::hidden_product", mutates_args=())
def hidden_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A product that the dispatcher cannot see into."""
    return x @ y


def test_an_unknown_operation_is_an_error_that_names_it():
    """FlopCounterMode counts both as 0."""
    x = torch.randn(4, 4)
    with pytest.raises(UncountedOp, match=r"goldengate_test\.hidden_product is not known.*free_ops"), OpCounter():
        hidden_product(x, x)
    with pytest.raises(UncountedOp, match=r"aten\._cdist_forward"), OpCounter():
        torch.cdist(x, x)


def test_backward_flops_belong_to_the_module_that_made_them():
    """Also for a module that runs twice, and for a product that a module computes itself."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return (self.b(self.b(self.a(x))).t() @ x).sum()

    net, x = Net(), leaf(6, 4)
    with counting({"net": net}) as counter:
        net(x).backward()
    found: dict[tuple[str, bool], int] = {}
    for one in counter.counted:
        found[one.module, one.backward] = found.get((one.module, one.backward), 0) + one.flops
    assert found == {
        ("net.a", False): 2 * 6 * 4 * 6,
        ("net.a", True): 2 * 2 * 6 * 4 * 6,
        ("net.b", False): 2 * 2 * 6 * 6 * 6,
        ("net.b", True): 2 * 2 * 2 * 6 * 6 * 6,
        ("net", False): 2 * 6 * 6 * 4,
        ("net", True): 2 * 2 * 6 * 6 * 4,
    }


def test_two_counters_that_disagree_are_an_error(monkeypatch):
    """FlopCounterMode is run beside ours, and compared."""
    monkeypatch.setattr(FlopCounterMode, "get_total_flops", lambda self: 1)
    net, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="FlopCounterMode counts 1, this counter"), counting({"": net}):
        net(x)


@pytest.mark.parametrize("length", [1, 24, 64, 65, 200])
@pytest.mark.parametrize(("k", "v"), [(16, 16), (16, 24)])
def test_chunked_gated_delta_rule(length, k, v):
    """Megatron's own torch path, at any length: padded to chunks, first and last state without a gradient."""
    batch, heads = 2, 3
    q, key, value = leaf(batch, length, heads, k), leaf(batch, length, heads, k), leaf(batch, length, heads, v)
    g, beta = -torch.rand(batch, length, heads), torch.rand(batch, length, heads)
    g.requires_grad_(), beta.requires_grad_()
    with OpCounter() as ours:
        out, _ = torch_chunk_gated_delta_rule(q, key, value, g=g, beta=beta)
        forward = ours.total
        out.sum().backward()
    part = recurrent._delta_rule(Run((length,) * batch, "hardware", "torch"), "layers.0", heads, k, v)
    assert (forward, ours.total - forward) == (part.forward, part.backward)
