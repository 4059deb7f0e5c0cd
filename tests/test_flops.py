"""FLOPs by formula: every block against numbers worked out by hand, patterns, conventions, and errors that say what is wrong.

Where a comment gives a product, it is the whole count: nothing is taken from the code under test.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    AttentionConfig,
    MLPConfig,
    TransformerBlockConfig,
)

from bridges import GPTModelProvider, MLAModelProvider
from harness.flops import FlopsError, Run, flops
from harness.flops.run import Part

L, BATCH = 100, 3
T = L * BATCH  # tokens


def dense[P: GPTModelProvider](kind: type[P] = GPTModelProvider, **fields) -> P:
    """Two layers, h 64, 4 heads in 2 groups of 24 channels, ffn 96, vocabulary 131. Not finalized: fields are what they are."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 24}
    return kind(**{**sizes, "ffn_hidden_size": 96, "vocab_size": 131, **fields})


def moe(**fields) -> GPTModelProvider:
    return dense(**{"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, **fields})


def mla(**fields) -> MLAModelProvider:
    sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 40}
    heads = {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 20}
    return MLAModelProvider(**{**sizes, **heads, "ffn_hidden_size": 96, "vocab_size": 131, **fields})


def gdn(**fields) -> GPTModelProvider:
    """Layer 0 linear, layer 1 softmax; 2 key heads of 16, 4 value heads of 24, 4 taps."""
    heads = {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2}
    rest = {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "linear_attention_freq": 2}
    return dense(**{"experimental_attention_variant": "gated_delta_net", **heads, **rest, **fields})


def counts(config, convention="model", kernels="torch", **batch) -> dict[str, tuple[int, int]]:
    """{part: (forward, backward)} over all layers, of 3 sequences of 100 tokens unless `batch` says otherwise."""
    found = flops(config, convention=convention, kernels=kernels, **{"seq": L, "batch": BATCH, **batch})
    return {name: (part.forward, part.backward) for name, part in found.by_part().items()}


def linear(inputs: int, outputs: int, layers: int = 1, tokens: int = T) -> tuple[int, int]:
    return 2 * tokens * inputs * outputs * layers, 4 * tokens * inputs * outputs * layers


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_dense_layers_and_head():
    """q 4 x 24 and k, v 2 x 24 each; a gated feed-forward has three matrices."""
    assert counts(dense()) == {
        "qkv": linear(64, 96 + 48 + 48, 2),
        "core_attention": (2 * 3 * 100 * 100 * (96 + 96) * 2, 2 * 2 * 3 * 100 * 100 * (96 + 96) * 2),
        "o_proj": linear(96, 64, 2),
        "dense_mlp": linear(64, 3 * 96, 2),
        "logits": linear(64, 131),
    }


def test_one_dense_layer_is_these_numbers():
    """The same, as plain numbers."""
    parts = counts(dense(num_layers=1), seq=10, batch=1)
    assert parts["qkv"] == (245_760, 491_520)  # 2 x 10 x 64 x 192
    assert parts["core_attention"] == (38_400, 76_800)  # 2 x 100 pairs x 192
    assert parts["o_proj"] == (122_880, 245_760)  # 2 x 10 x 96 x 64
    assert parts["dense_mlp"] == (368_640, 737_280)  # 2 x 10 x 64 x 288
    assert parts["logits"] == (167_680, 335_360)  # 2 x 10 x 64 x 131


def test_an_output_gate_is_one_more_query_projection():
    """Per head a gate beside the query: 64 x 96 more."""
    more = counts(dense(attention_output_gate=True))["qkv"][0] - counts(dense())["qkv"][0]
    assert more == 2 * T * 64 * 96 * 2


@pytest.mark.parametrize("activation", [F.silu, F.gelu, lambda x: x])
def test_a_gate_counts_whatever_the_activation_is(activation):
    """A public calculator counted the third matrix for F.silu alone."""
    assert counts(dense(activation_func=activation))["dense_mlp"] == linear(64, 3 * 96, 2)
    plain = dense(activation_func=activation, gated_linear_unit=False)
    assert counts(plain)["dense_mlp"] == linear(64, 2 * 96, 2)


def test_heads_wider_than_the_hidden_size_count_with_their_width():
    """kv_channels is not hidden size over heads: 4 heads of 24 on 64."""
    assert counts(dense(kv_channels=48))["o_proj"] == linear(192, 64, 2)


def test_experts_router_and_shared_expert():
    """Two of eight experts of 48, a shared expert of 80 with its gate; the router sees all eight."""
    parts = counts(moe(moe_shared_expert_intermediate_size=80, moe_shared_expert_gate=True))
    assert parts["router"] == linear(64, 8, 2)
    assert parts["experts"] == linear(64, 2 * 3 * 48, 2)
    assert parts["shared_experts"] == linear(64, 3 * 80, 2)
    assert parts["shared_expert_gate"] == linear(64, 1, 2)
    assert "dense_mlp" not in parts
    assert not {"shared_experts", "shared_expert_gate"} & set(counts(moe()))


def test_experts_in_a_latent():
    """Down and up once a token, the chosen experts on 32 channels, the shared expert and the router on all 64."""
    parts = counts(moe(moe_latent_size=32, moe_shared_expert_intermediate_size=80))
    assert parts["moe_latent_down"] == linear(64, 32, 2)
    assert parts["experts"] == linear(32, 2 * 3 * 48, 2)
    assert parts["moe_latent_up"] == linear(32, 64, 2)
    assert parts["shared_experts"] == linear(64, 3 * 80, 2)


def test_latent_attention():
    """4 heads: keys 16 + 8 rotated, values 20; latents of 40 (queries) and 32."""
    parts = counts(mla())
    assert parts["mla_q_down"] == linear(64, 40)
    assert parts["mla_q_up"] == linear(40, 4 * 24)
    assert parts["mla_kv_down"] == linear(64, 32 + 8)
    assert parts["mla_kv_up"] == linear(32, 4 * (16 + 20))
    assert parts["core_attention"] == (2 * 3 * 100 * 100 * 4 * (24 + 20), 4 * 3 * 100 * 100 * 4 * (24 + 20))
    assert parts["o_proj"] == linear(4 * 20, 64)
    whole = counts(mla(q_lora_rank=None))
    assert whole["mla_q_proj"] == linear(64, 4 * 24)
    assert "mla_q_down" not in whole


def test_gated_delta_net_under_the_public_convention():
    """q, k 2 x 16, v and gate 4 x 24, beta and alpha 4 each; 4 taps on 160 channels; four 16 x 24 products a token and head."""
    parts = counts(gdn())
    assert parts["gdn_in_proj"] == linear(64, 32 + 32 + 96 + 96 + 4 + 4)
    assert parts["gdn_conv"] == (2 * T * 4 * 160, 4 * T * 4 * 160)
    assert parts["gdn_recurrence"] == (8 * T * 4 * 16 * 24, 16 * T * 4 * 16 * 24)
    assert parts["gdn_out_proj"] == linear(96, 64)
    assert parts["qkv"] == linear(64, 192)  # the other layer


def test_gated_delta_net_as_the_torch_path_runs_it():
    """100 tokens are two chunks of 64; the convolution computes three positions past the end."""
    parts = counts(gdn(), "hardware")
    chunk = 2 * 64 * 64 * (3 * 16 + 2 * 24) + 3 * 2 * 64 * 16 * 24
    unused = 2 * (2 * 64 * 16 * 24) + 2 * (2 * 64 * 16 * 24)  # first state in, last state out
    assert parts["gdn_recurrence"] == (3 * 4 * 2 * chunk, 3 * 4 * (2 * 2 * chunk - unused))
    assert parts["gdn_conv"] == (2 * 3 * 103 * 4 * 160, 4 * 3 * 103 * 4 * 160)


def test_gated_delta_net_at_real_dims_is_what_was_measured():
    """facts: 180,224 FLOPs a token and head forward at d = 128, where the public convention has 131,072 (0.73x)."""
    real = gdn(linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32)
    forward, backward = counts(real, "hardware", seq=4096, batch=1)["gdn_recurrence"]
    assert forward == 4096 * 32 * 180_224
    assert 2.82 < (forward + backward) / forward < 3.0
    assert counts(real, "model", seq=4096, batch=1)["gdn_recurrence"][0] == 4096 * 32 * 131_072


def test_gated_delta_net_as_fla_runs_it():
    """The same products forward and 16 of 16 x 16 blocks for the inverse; backward recomputes w, u and the states. k = v = d:
    per chunk of C: C C d products: 2 (w, u) + 2 (dv) + 4 (dq, dk) + 7 (wy); C d d: 2 (states) + 3 + 3; C C C: 2."""
    square = gdn(linear_key_head_dim=32, linear_value_head_dim=32, linear_num_key_heads=1, linear_num_value_heads=1)
    forward, backward = counts(square, "hardware", "fused", seq=64, batch=1)["gdn_recurrence"]
    assert forward == 2 * 64 * 64 * 5 * 32 + 3 * 2 * 64 * 32 * 32 + 16 * 2 * 16**3
    assert backward == 2 * (15 * 64 * 64 * 32 + 8 * 64 * 32 * 32 + 2 * 64 * 64 * 64)
    assert counts(square, "hardware", "fused")["gdn_conv"][0] == 2 * T * 4 * 96


def test_multi_token_prediction():
    """Each depth: [hidden ; embedding] 128 -> 64, a layer like the last one, the head again."""
    parts = counts(moe(moe_layer_freq=[0, 1], mtp_num_layers=2))
    assert parts["mtp_proj"] == linear(128, 64, 2)
    assert parts["mtp_head"] == linear(64, 131, 2)
    assert parts["logits"] == linear(64, 131)
    assert parts["experts"] == linear(64, 2 * 3 * 48, 1 + 2)
    assert parts["dense_mlp"] == linear(64, 3 * 96, 1)
    assert parts["qkv"] == linear(64, 192, 4)
    detached = counts(dense(mtp_num_layers=1, mtp_detach_heads=True))["mtp_head"]
    assert detached == (2 * T * 64 * 131, 2 * T * 64 * 131)  # no gradient for the head's weight


def test_sparse_attention():
    """An indexer of 2 heads of 12 scores all keys; absorbed attention meets 30: positions 1..30 see 1..30 keys, 70 see 30."""
    config = mla(
        num_layers=2,
        experimental_attention_variant="dsa",
        dsa_indexer_n_heads=2,
        dsa_indexer_head_dim=12,
        dsa_indexer_topk=30,
    )
    parts = counts(config, "causal", batch=1)
    pairs = 30 * 31 // 2 + 70 * 30
    assert parts["dsa_sparse_core"][0] == 2 * (2 * pairs * 4 * (32 + 8 + 32))
    assert parts["dsa_q_absorb"] == linear(4 * 16, 32, 2, tokens=100)
    assert parts["dsa_v_up"] == linear(4 * 32, 20, 2, tokens=100)
    assert parts["dsa_indexer_projections"] == (2 * 2 * 100 * (40 * 24 + 64 * 12 + 64 * 2), 0)
    assert parts["dsa_indexer_scores"] == (2 * (2 * 5000 * 24), 0)  # half of 100 x 100 pairs
    assert "mla_kv_up" not in parts  # absorbed
    assert "core_attention" not in parts
    learning = counts(dataclasses.replace(config, dsa_indexer_loss_coeff=0.1), "causal", batch=1)
    assert learning["dsa_indexer_scores"][1] == 2 * learning["dsa_indexer_scores"][0]
    assert learning["dsa_indexer_projections"][1] == learning["dsa_indexer_projections"][0]
    sharing = counts(dataclasses.replace(config, dsa_indexer_topk_freq=2), "causal", batch=1)
    assert sharing["dsa_indexer_scores"][0] * 2 == parts["dsa_indexer_scores"][0]


@dataclasses.dataclass
class HybridProvider(GPTModelProvider):
    """With Megatron's hybrid letters, which its models take beside the configuration."""

    hybrid_layer_pattern: str = ""


def hybrid(pattern: str, **fields) -> HybridProvider:
    """A dense configuration with Megatron's hybrid letters."""
    layers = len(pattern.partition("/")[0].replace("|", ""))
    return dense(HybridProvider, is_hybrid_model=True, num_layers=layers, hybrid_layer_pattern=pattern, **fields)


def test_mamba():
    """8 heads of 16 channels, 2 groups of state 32: 2 x 128 + 2 x 64 + 8 outputs; 7 x inner x state, Megatron's own count."""
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_state_dim": 32}
    parts = counts(hybrid("M", **sizes))
    assert parts["mamba_in_proj"] == linear(64, 256 + 128 + 8)
    assert parts["mamba_conv"][0] == 2 * T * 4 * (128 + 128)
    assert parts["mamba_scan"][0] == 7 * T * 128 * 32
    assert parts["mamba_out_proj"] == linear(128, 64)
    derived = counts(hybrid("M", **{**sizes, "mamba_num_heads": None}))
    assert derived["mamba_out_proj"] == linear(128, 64)  # 2 x hidden size, by the module's own expansion
    fused = counts(hybrid("M", **sizes), "hardware", "fused", batch=1)
    assert fused["mamba_scan"][0] == 2 * 128 * (128 * (2 * 32 + 128) + 2 * 128 * 32)  # one chunk of 128
    with pytest.raises(FlopsError, match="kernels for GPUs alone"):
        counts(hybrid("M", **sizes), "hardware")


# -- patterns --------------------------------------------------------------------------------------------------------


def test_hybrid_letters_are_blocks():
    """`M*-E/M-`: four layers, and one MTP depth of two."""
    config = hybrid("M*|-E/M-", num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=48)
    found = flops(config, seq=L, convention="model")
    layers = {name: part.place for name, part in found.by_part().items()}
    assert layers["mamba_scan"] == "2"
    assert layers["core_attention"] == layers["experts"] == layers["mtp_proj"] == layers["mtp_head"] == "1"
    assert layers["dense_mlp"] == "2"
    assert set(found.by_place()) == {"layers.0", "layers.1", "layers.2", "layers.3", "mtp.0", "output"}


@dataclasses.dataclass
class BlocksProvider(GPTModelProvider):
    """With what Megatron's heterogeneous configuration says of each block."""

    per_block_parameters: list[TransformerBlockConfig] = dataclasses.field(default_factory=list)


def test_heterogeneous_layers():
    """A block with its own groups and width, a square matrix, nothing."""
    own = TransformerBlockConfig(AttentionConfig(num_query_groups=1), MLPConfig(ffn_hidden_size=32))
    square = TransformerBlockConfig(AttentionConfig(replace_with_linear=True), MLPConfig(replace_with_linear=True))
    nothing = TransformerBlockConfig(AttentionConfig(no_op=True), MLPConfig(no_op=True))
    blocks = [own, square, nothing]
    config = dense(BlocksProvider, num_layers=3, heterogeneous_block_specs=True, per_block_parameters=blocks)
    parts = counts(config)
    assert parts["qkv"] == linear(64, 96 + 24 + 24)
    assert parts["dense_mlp"] == linear(64, 3 * 32)
    assert parts["attention_linear"] == parts["mlp_linear"] == linear(64, 64)
    config.per_block_parameters = [own]
    with pytest.raises(FlopsError, match="per_block_parameters has 1 entries, the model 3 layers"):
        counts(config)


@pytest.mark.parametrize(("freq", "experts"), [(1, 4), (2, 2), (3, 2), ([0, 1, 1, 1], 3), ([0, 0, 0, 1], 1)])
def test_moe_layer_freq(freq, experts):
    """Megatron counts a frequency from the first layer."""
    found = flops(moe(num_layers=4, moe_layer_freq=freq), seq=L).by_part()
    assert found["experts"].place == str(experts)
    assert found.get("dense_mlp", Part("", "0", 0, 0)).place == str(4 - experts)


@pytest.mark.parametrize(("freq", "linears"), [(2, 2), (4, 3), ([1, 1, 0, 0], 2), ([1, 0, 0, 0], 1)])
def test_linear_attention_freq(freq, linears):
    """With the whole number N every Nth layer is softmax attention."""
    found = flops(gdn(num_layers=4, linear_attention_freq=freq), seq=L).by_part()
    assert found["gdn_recurrence"].place == str(linears)
    assert found["core_attention"].place == str(4 - linears)


def test_new_blocks_differ_from_plain_attention_and_ratios_change_the_count():
    """The rule of the seeds for every new block."""
    plain = flops(dense(num_layers=4), seq=L).total
    ratios = [flops(gdn(num_layers=4, linear_attention_freq=freq), seq=L).total for freq in (2, 4, [1, 0, 0, 0])]
    assert len({plain, *ratios}) == 4
    assert flops(dense(mtp_num_layers=1), seq=L).total > flops(dense(), seq=L).total


# -- conventions -----------------------------------------------------------------------------------------------------


def test_causal_is_half_of_the_core_and_of_nothing_else():
    """Projections are the same; odd squares stay whole numbers of FLOPs."""
    full, half = counts(dense(), seq=101), counts(dense(), "causal", seq=101)
    assert half.pop("core_attention")[0] * 2 == full.pop("core_attention")[0]
    assert half == full


@pytest.mark.parametrize("seen", [1, 7, 50, 90])
def test_windows_are_exact_by_position(seen):
    """The sum over positions of the keys that a query sees, itself included."""
    parts = counts(dense(window_size=(seen - 1, 0)), "causal", batch=1)
    pairs = sum(min(i, seen) for i in range(1, L + 1))
    assert parts["core_attention"][0] == 2 * pairs * 192 * 2
    assert counts(dense(window_size=(seen - 1, 0)), batch=1)["core_attention"][0] == 2 * L * seen * 192 * 2


def test_windows_skip_layers():
    """A list says which layers have one; Megatron's frequency N leaves every Nth layer whole."""
    for skip in ([1, 0], 2):
        config = dense(window_size=(9, 0), window_attn_skip_freq=skip)
        found = {p.place: p.forward for p in flops(config, seq=L).parts if p.name == "core_attention"}
        assert found["layers.0"] == 2 * sum(min(i, 10) for i in range(1, L + 1)) * 192
        assert found["layers.1"] == L * L * 192


@given(length=st.integers(1, 300), seen=st.integers(1, 320))
def test_a_window_costs_no_more_than_a_wider_one(length, seen):
    """Under every convention, up to no window at all."""
    for convention in ("model", "causal", "hardware"):
        run = Run((length,), convention, "fused")
        assert run.twice_pairs(seen) <= run.twice_pairs(seen + 1) <= run.twice_pairs(None)


def test_hardware_on_this_cpu_computes_whole_scores():
    """A mask hides scores that were computed, with and without a window."""
    assert counts(dense(window_size=(9, 0)), "hardware")["core_attention"] == counts(dense())["core_attention"]


def test_fused_attention_computes_the_scores_again():
    """Forward two products of the visible pairs, backward five."""
    forward, backward = counts(dense(), "hardware", "fused", batch=1)["core_attention"]
    assert forward == 2 * (2 * (L * (L + 1) // 2) * (96 + 96))
    assert 2 * backward == 5 * forward


def test_packed_documents_do_not_see_each_other():
    """The core goes with the sum of squares, everything else with the tokens; padding is not counted."""
    packed, whole = counts(dense(), packed=[60, 30], batch=2), counts(dense(), batch=2)
    assert packed["core_attention"][0] * L * L == whole["core_attention"][0] * (60 * 60 + 30 * 30)
    assert packed["qkv"][0] * 100 == whole["qkv"][0] * 90
    with pytest.raises(FlopsError, match="sum to 110, more than the sequence of 100"):
        counts(dense(), packed=[60, 50])


def test_padding_of_the_vocabulary_is_hardware_work_with_its_own_name():
    """131 rows padded to 192: the model does not get credit for 61 rows that predict nothing."""
    config = dense(make_vocab_size_divisible_by=64, mtp_num_layers=1)
    assert "logits_padding" not in counts(config, "causal")
    parts = counts(config, "hardware")
    assert parts["logits"] == parts["mtp_head"] == linear(64, 131)
    assert parts["logits_padding"] == parts["mtp_head_padding"] == linear(64, 61)


def test_totals_add_up():
    """Over parts, over layers, and per token."""
    found = flops(moe(mtp_num_layers=1), seq=L, batch=BATCH)
    assert sum(found.by_place().values()) == found.total == found.forward + found.backward
    assert sum(p.total for p in found.by_part().values()) == found.total
    assert found.per_token * T == pytest.approx(found.total)
    data = found.as_dict()
    assert data["total"] == sum(p["total"] for p in data["parts"])
    assert sum(p["share"] for p in data["parts"]) == pytest.approx(1)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dense(hidden_size=None), "hidden_size is None, a whole number is needed: finalize"),
        (dense(kv_channels=None), "kv_channels is None"),
        (dense(num_layers=0), "num_layers is 0, at least 1"),
        (dense(ffn_hidden_size=96.0), r"ffn_hidden_size is 96.0, a whole number is needed$"),
        (dense(ffn_hidden_size=True), "ffn_hidden_size is True"),
        (dense(gated_linear_unit="yes"), "gated_linear_unit is 'yes', True or False"),
        (moe(moe_layer_freq=[1, 1, 0]), "moe_layer_freq has 3 entries, the model 2 layers"),
        (moe(moe_layer_freq="1,0"), "moe_layer_freq is '1,0': a whole number or a list of 2"),
        (moe(moe_layer_freq=[1, 2]), "moe_layer_freq holds 2: a pattern is made of 0 and 1"),
        (moe(moe_layer_freq=0), "moe_layer_freq is 0, at least 1"),
        (moe(moe_router_topk=9), "moe_router_topk is 9, but there are 8 experts"),
        (gdn(linear_attention_freq=None), "linear_attention_freq is None"),
        (gdn(linear_attention_freq=[1]), "linear_attention_freq has 1 entries, the model 2 layers"),
        (gdn(linear_num_value_heads=3), "linear_num_value_heads 3 is no multiple of linear_num_key_heads 2"),
        (dense(window_size=5), "window_size is 5: a pair"),
        (dense(window_size=(5, 2)), "does not look ahead"),
        (dense(window_size=(5, 0), window_attn_skip_freq=[1]), "window_attn_skip_freq has 1 entries"),
        (dense(experimental_attention_variant="mega"), "'mega' is not known"),
        (dense(multi_latent_attention=True), "GPTModelProvider has no field 'v_head_dim'"),
        (mla(experimental_attention_variant="dsa"), "dsa_indexer_n_heads is None"),
        (dense(is_hybrid_model=True), "no field 'hybrid_layer_pattern'"),
        (hybrid("M?"), "is not a valid layer symbol"),
        (dense(heterogeneous_block_specs=True), "no field 'per_block_parameters'"),
        (dense(vocab_size=0), "vocab_size is 0, at least 1"),
        (SimpleNamespace(), "SimpleNamespace has no field 'is_hybrid_model'"),
    ],
)
def test_a_wrong_configuration_is_an_error_that_says_so(config, message):
    """Missing field, wrong type, wrong length: nothing has a fallback."""
    with pytest.raises(FlopsError, match=message):
        flops(config, seq=L)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"seq": 0}, "each a whole number above 0"),
        ({"seq": 10.0}, "each a whole number above 0"),
        ({"seq": 10, "batch": 0}, "batch is 0"),
        ({"seq": 10, "packed": []}, "at least one"),
        ({"seq": 10, "convention": "half"}, "convention 'half' is not known: model, causal, hardware"),
        ({"seq": 10, "kernels": "triton"}, "kernels 'triton' are not known: torch, fused"),
    ],
)
def test_a_wrong_batch_is_an_error_that_says_so(batch, message):
    with pytest.raises(FlopsError, match=message):
        flops(dense(), **batch)


def test_dropping_tokens_is_not_countable_as_hardware():
    """What runs depends on the data; the model's own FLOPs do not."""
    config = moe(moe_expert_capacity_factor=1.0)
    assert counts(config, "causal")["experts"] == linear(64, 2 * 3 * 48, 2)
    with pytest.raises(FlopsError, match="moe_expert_capacity_factor drops or pads"):
        counts(config, "hardware")
