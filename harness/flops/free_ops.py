"""Operations without arithmetic of matmul kind, by name: they count as 0. Nothing is free because it is unknown.

What these lists cannot see: a product and a sum written out as `(a * b).sum()`, each of which is elementwise. Megatron's
torch path of the gated delta rule inverts its triangles so; docs/flops.md says what that would be.
"""

COMMUNICATION = frozenset({"c10d", "_c10d_functional"})

_MAKING = """
arange empty empty_like empty_strided eye fill_ full full_like lift_fresh new_empty new_empty_strided new_full new_ones
new_zeros ones ones_like rand_like scalar_tensor tril triu zero_ zeros zeros_like
"""
_MOVING = """
_local_scalar_dense _reshape_alias _to_copy _unsafe_view alias as_strided cat clone constant_pad_nd copy_ detach detach_
embedding embedding_dense_backward expand flip gather index index_add index_add_ index_put index_put_ index_select
masked_fill masked_fill_ masked_scatter masked_select nonzero permute repeat resize_ roll scatter scatter_ scatter_add
scatter_add_ select select_backward set_ slice slice_backward slice_scatter select_scatter split split_with_sizes squeeze
stack t transpose unbind unsqueeze view where
"""
_ELEMENTWISE = """
abs add add_ bitwise_and bitwise_and_ bitwise_not bitwise_or bitwise_or_ ceil clamp clamp_ clamp_min clamp_min_ cos div
div_ eq exp exp_ floor floor_divide ge gelu gelu_backward gt isnan le log log_ log1p logical_and logical_not logical_or lt
max maximum min minimum mul mul_ ne neg neg_ pow reciprocal relu remainder rsqrt rsub sigmoid sigmoid_backward sign silu
silu_backward sin softplus softplus_backward sqrt sub sub_ tanh tanh_backward threshold_backward
"""
_REDUCING = """
_log_softmax _log_softmax_backward_data _softmax _softmax_backward_data all amax amin any argmax argmin argsort bincount
cumsum histc linalg_vector_norm max mean min native_layer_norm native_layer_norm_backward nll_loss_backward
nll_loss_forward sort sum topk
"""
FREE: frozenset[str] = frozenset(f"aten.{op}" for op in f"{_MAKING} {_MOVING} {_ELEMENTWISE} {_REDUCING}".split())
