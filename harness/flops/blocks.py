"""Attention and feed-forward blocks. h hidden size, n query heads, g query groups, d head dim.

Every formula is a product of sizes; docs/flops.md has them as a table.
"""

from __future__ import annotations

from harness.flops.fields import Fields, FlopsError, window
from harness.flops.run import Part, Replicated, Run

# Work on tokens, not on shards of a weight: tensor-parallel ranks that all hold the same tokens all do it. That is so for
# the experts too, which then receive every token once from each of these ranks.
ALONE: Replicated = "without sequence parallel"


def attention(f: Fields, run: Run, place: str, layer_number: int, groups: int | None = None) -> list[Part]:
    """Grouped-query attention; `groups` overrides the number of query groups (heterogeneous layers)."""
    h, n, d = f.integer("hidden_size"), f.integer("num_attention_heads"), f.integer("kv_channels")
    g = f.optional("num_query_groups") or n if groups is None else groups
    gate = n if f.flag("attention_output_gate") else 0
    return [
        run.linear("qkv", place, h, (n + gate + 2 * g) * d),
        run.attention("core_attention", place, n * d, n * d, window(f, layer_number)),
        run.linear("o_proj", place, n * d, h),
    ]


def latent_attention(f: Fields, run: Run, place: str, layer_number: int) -> list[Part]:
    """Multi-latent attention: keys and values from one latent, the down projections on every tensor-parallel rank."""
    h, n, value = f.integer("hidden_size"), f.integer("num_attention_heads"), f.integer("v_head_dim")
    nope, rope, latent = f.integer("qk_head_dim"), f.integer("qk_pos_emb_head_dim"), f.integer("kv_lora_rank")
    return [
        *_latent_queries(f, run, place),
        run.linear("mla_kv_down", place, h, latent + rope, replicated=ALONE),
        run.linear("mla_kv_up", place, latent, n * (nope + value)),
        run.attention("core_attention", place, n * (nope + rope), n * value, window(f, layer_number)),
        run.linear("o_proj", place, n * value, h),
    ]


def _latent_queries(f: Fields, run: Run, place: str) -> list[Part]:
    h, n = f.integer("hidden_size"), f.integer("num_attention_heads")
    width = n * (f.integer("qk_head_dim") + f.integer("qk_pos_emb_head_dim"))
    rank = f.optional("q_lora_rank")
    if rank is None:
        return [run.linear("mla_q_proj", place, h, width)]
    return [
        run.linear("mla_q_down", place, h, rank, replicated=ALONE),
        run.linear("mla_q_up", place, rank, width),
    ]


def sparse_attention(f: Fields, run: Run, place: str, layer_number: int) -> list[Part]:
    """DeepSeek sparse attention as Megatron runs it: an indexer scores all keys with few small heads, and absorbed
    latent attention (keys and values are the latent itself) meets the `dsa_indexer_topk` best.

    Layers that reuse another's choice have no indexer. The choice has no gradient: the indexer learns from its own loss,
    whose inputs are detached (no gradient for its projections' inputs), against the scores of the real attention.
    """
    h, n, value = f.integer("hidden_size"), f.integer("num_attention_heads"), f.integer("v_head_dim")
    nope, rope, latent = f.integer("qk_head_dim"), f.integer("qk_pos_emb_head_dim"), f.integer("kv_lora_rank")
    rank = f.optional("q_lora_rank")
    if rank is None:
        raise FlopsError("q_lora_rank is None: the indexer of sparse attention reads the query latent")
    parts = [
        *_latent_queries(f, run, place),
        run.linear("mla_kv_down", place, h, latent + rope, replicated=ALONE),
        run.linear("dsa_q_absorb", place, n * nope, latent),
    ]
    heads, dim, topk = (f.integer(f"dsa_indexer_{x}") for x in ("n_heads", "head_dim", "topk"))
    offset, every = f.integer("dsa_indexer_skip_topk_offset", least=0), f.integer("dsa_indexer_topk_freq")
    if max(layer_number - max(offset, 1), 0) % every == 0:
        learns = bool(f.get("dsa_indexer_loss_coeff"))
        projections = 2 * run.tokens * (rank * heads * dim + h * dim + h * heads)
        scores = run.twice_pairs() * heads * dim
        parts += [
            Part("dsa_indexer_projections", place, projections, projections if learns else 0, replicated="always"),
            Part("dsa_indexer_scores", place, scores, 2 * scores if learns else 0, replicated="always"),
        ]
        if learns:
            parts.append(Part("dsa_indexer_loss", place, run.twice_pairs() * n * (latent + rope), 0))
    return [
        *parts,
        run.attention("dsa_sparse_core", place, n * (latent + rope), n * latent, topk),
        run.linear("dsa_v_up", place, n * latent, value),
        run.linear("o_proj", place, n * value, h),
    ]


# -- feed-forward ----------------------------------------------------------------------------------------------------


def matrices(f: Fields) -> int:
    """Matrices of a feed-forward block: a gated one has three, whatever its activation function is."""
    return 3 if f.flag("gated_linear_unit") else 2


def dense_mlp(f: Fields, run: Run, place: str, ffn: int | None = None) -> list[Part]:
    """`ffn` overrides the width (heterogeneous layers)."""
    width = f.integer("ffn_hidden_size") if ffn is None else ffn
    return [run.linear("dense_mlp", place, f.integer("hidden_size"), matrices(f) * width)]


def moe(f: Fields, run: Run, place: str) -> list[Part]:
    """Router, the chosen experts, shared experts and their gate. With `moe_latent_size` the experts live in a latent."""
    h, topk = f.integer("hidden_size"), f.integer("moe_router_topk")
    experts, ffn = f.integer("num_moe_experts"), f.integer("moe_ffn_hidden_size")
    if topk > experts:
        raise FlopsError(f"moe_router_topk is {topk}, but there are {experts} experts (num_moe_experts)")
    if run.hardware and f.get("moe_expert_capacity_factor") is not None:
        raise FlopsError(
            "moe_expert_capacity_factor drops or pads tokens: what the hardware does depends on the data; "
            "count the model or causal convention"
        )
    latent = f.optional("moe_latent_size")
    parts = [run.linear("router", place, h, experts, replicated=ALONE)]
    if latent is not None:
        parts.append(run.linear("moe_latent_down", place, h, latent, replicated=ALONE))
    parts.append(run.linear("experts", place, latent or h, topk * matrices(f) * ffn, replicated=ALONE))
    if latent is not None:
        parts.append(run.linear("moe_latent_up", place, latent, h, replicated=ALONE))
    shared = f.optional("moe_shared_expert_intermediate_size", least=0)
    if shared:
        parts.append(run.linear("shared_experts", place, h, matrices(f) * shared))
        if f.flag("moe_shared_expert_gate"):
            parts.append(run.linear("shared_expert_gate", place, h, 1, replicated=ALONE))
    return parts
