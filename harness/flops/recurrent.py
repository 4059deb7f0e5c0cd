"""Blocks whose cost is linear in the sequence: the gated delta rule and Mamba.

`model` and `causal` count the recurrence token by token; `hardware` counts the chunked kernels that really run.
k key head dim, v value head dim, C chunk.
"""

from __future__ import annotations

from harness.flops.fields import Fields, FlopsError
from harness.flops.run import CHUNK, Part, Run

MAMBA_CONV = 4  # MambaMixer's own defaults; no configuration field says them
MAMBA_EXPAND = 2
MAMBA_CHUNK = 128


def gated_delta_net(f: Fields, run: Run, place: str) -> list[Part]:
    """Gated DeltaNet: one projection to q, k, v, gate, beta and alpha; a depthwise convolution; the delta rule."""
    h = f.integer("hidden_size")
    k, v = f.integer("linear_key_head_dim"), f.integer("linear_value_head_dim")
    key_heads, value_heads = f.integer("linear_num_key_heads"), f.integer("linear_num_value_heads")
    if value_heads % key_heads:
        raise FlopsError(f"linear_num_value_heads {value_heads} is no multiple of linear_num_key_heads {key_heads}")
    keys, values = key_heads * k, value_heads * v
    return [
        run.linear("gdn_in_proj", place, h, 2 * keys + 2 * values + 2 * value_heads),
        _convolution("gdn_conv", run, place, 2 * keys + values, f.integer("linear_conv_kernel_dim")),
        _delta_rule(run, place, value_heads, k, v),
        run.linear("gdn_out_proj", place, values, h),
    ]


def _convolution(name: str, run: Run, place: str, channels: int, width: int) -> Part:
    """A depthwise convolution, `width` taps. torch's computes the width - 1 positions past the end too, which Megatron
    cuts off."""
    past = width - 1 if run.hardware and run.kernels == "torch" else 0
    forward = 2 * sum(length + past for length in run.lengths) * channels * width
    return Part(name, place, forward, 2 * forward)


def _delta_rule(run: Run, place: str, heads: int, k: int, v: int) -> Part:
    """Every head keeps a state [k, v]."""
    if not run.hardware:
        # Four products of k x v a token, as all public calculators count them: k k^T, v k^T, the state's update, S q.
        forward = 8 * run.tokens * heads * k * v
        return Part("gdn_recurrence", place, forward, 2 * forward)
    forward = backward = 0
    for length in run.lengths:
        chunks = -(-length // CHUNK)
        # Three k-wide and two v-wide C x C products, and three with the state.
        once = 2 * CHUNK * (CHUNK * (3 * k + 2 * v) + 3 * k * v)
        forward += chunks * once
        if run.kernels == "torch":
            # Nobody needs the gradient of the first, empty state (2 products) nor has one for the last (2 products).
            backward += 2 * chunks * once - 8 * CHUNK * k * v
        else:
            inverse = _FLA_INVERSE
            forward += chunks * inverse
            backward += chunks * _fla_backward(k, v)
    return Part("gdn_recurrence", place, heads * forward, heads * backward)


# flash-linear-attention inverts the unit lower triangle of a chunk from its four diagonal blocks of 16 by 16 products of
# two 16 x 16 blocks; the same loop in Megatron's torch path is elementwise.
_FLA_INVERSE = 16 * 2 * 16**3


def _fla_backward(k: int, v: int) -> int:
    """FLOPs a chunk and head of flash-linear-attention's chunk_gated_delta_rule_bwd (fla/ops/gated_delta_rule/chunk.py): the
    products of each kernel once; what a kernel repeats for each tile of k or v is not counted."""
    c = CHUNK
    again = 2 * c * (c * k + c * v) + 2 * 2 * c * k * v  # w, u and the states once more
    local = 2 * c * (c * k + c * v)  # dv inside the chunk
    states = 3 * 2 * c * k * v  # dh, and dv through it
    dqkw = 3 * 2 * c * k * v + 2 * c * (c * v + 3 * c * k)  # with q k^T once more for the gate's gradient
    wy = 2 * c * (5 * c * k + 2 * c * v + 2 * c * c)  # through w, u and the inverse
    return again + local + states + dqkw + wy


def mamba(f: Fields, run: Run, place: str) -> list[Part]:
    """Mamba-2: the state has `mamba_state_dim` values for each of `heads x head dim` channels."""
    h, dim = f.integer("hidden_size"), f.integer("mamba_head_dim")
    state, groups = f.integer("mamba_state_dim"), f.integer("mamba_num_groups")
    heads = f.optional("mamba_num_heads")
    if heads is None:
        if (MAMBA_EXPAND * h) % dim:
            raise FlopsError(f"mamba_head_dim {dim} does not divide {MAMBA_EXPAND} x hidden_size {h}")
        heads = MAMBA_EXPAND * h // dim
    inner = heads * dim
    if run.hardware and run.kernels == "torch":
        raise FlopsError("Mamba has kernels for GPUs alone: count hardware with fused kernels, or another convention")
    if run.hardware:
        padded = sum(-(-length // MAMBA_CHUNK) * MAMBA_CHUNK for length in run.lengths)
        # C B^T a group, its product with x, the chunk's state and what earlier states give.
        scan = 2 * padded * (MAMBA_CHUNK * (groups * state + inner) + 2 * inner * state)
    else:
        scan = 7 * run.tokens * inner * state  # Megatron's own count of the recurrence
    return [
        run.linear("mamba_in_proj", place, h, 2 * inner + 2 * groups * state + heads),
        _convolution("mamba_conv", run, place, inner + 2 * groups * state, MAMBA_CONV),
        Part("mamba_scan", place, scan, 2 * scan),
        run.linear("mamba_out_proj", place, inner, h),
    ]
