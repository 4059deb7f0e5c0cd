"""Plain-PyTorch modules that carry Transformer Engine's parameter names, so that one mapping table serves CPU and GPU.

They are Megatron's own parallel layers (real collectives, over gloo) plus what Transformer Engine fuses into them: the
norm in front of a column-parallel linear, grouped experts, and the core attention of its own file. `CPUSpecProvider` hands them to
Megatron's own layer specs in place of `TESpecProvider`; see cpu_substitutions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch.nn import Parameter

from bridges.providers.core_attention import CoreAttention


def normalise(x, weight, bias, config: TransformerConfig, eps: float) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last dim, as `config.normalization` says; a zero-centred weight stores gamma - 1.

    Statistics are taken in fp32, like both references (Transformer Engine and Hugging Face).
    """
    gamma = weight.float() + 1 if config.layernorm_zero_centered_gamma else weight.float()
    x32 = x.float()
    if config.normalization == "LayerNorm":
        return F.layer_norm(x32, x.shape[-1:], gamma, None if bias is None else bias.float(), eps).to(x.dtype)
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * gamma).to(x.dtype)


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x over its length along the last dim, as fla has it: eps is added to the squared length."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class Norm(torch.nn.Module):
    """`weight` [hidden] and, for LayerNorm unless `layernorm_bias` is off, `bias` [hidden]; replicated over tensor parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, has_residual: bool = False):
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(f"normalization {config.normalization!r}: RMSNorm or LayerNorm is known")
        self.config, self.eps = config, eps
        self.weight = _norm_parameter(config, hidden_size)
        has_bias = config.normalization == "LayerNorm" and getattr(config, "layernorm_bias", True)
        self.bias = _norm_parameter(config, hidden_size) if has_bias else None

    def forward(self, x):
        return normalise(x, self.weight, self.bias, self.config, self.eps)


def _norm_parameter(config: TransformerConfig, size: int) -> Parameter:
    parameter = Parameter(torch.ones(size, dtype=config.params_dtype))
    # Under sequence parallelism each rank sees a part of the tokens: Megatron then sums this gradient over TP.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class _Sharded:
    """`sharded_state_dict` with Transformer Engine's key names: what Megatron's own resharding goes by."""

    shard_dims: dict[str, int] = {}
    tp_group: Any
    state_dict: Any

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            {k: v for k, v in state.items() if torch.is_tensor(v)},
            prefix,
            self.shard_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class ColumnLinear(_Sharded, ColumnParallelLinear):
    """`weight` [out / tp, in], `bias` [out / tp]. Transformer Engine has no output gather."""

    shard_dims = {"weight": 0, "bias": 0}


class LayerNormColumnLinear(ColumnLinear):
    """A norm, then a column-parallel linear: adds `layer_norm_weight` (and `layer_norm_bias`) [in]."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = _norm_parameter(config, input_size)
        self.layer_norm_bias = _norm_parameter(config, input_size) if config.normalization == "LayerNorm" else None

    def forward(self, x, *args, **kwargs):
        config: Any = self.config
        x = normalise(x, self.layer_norm_weight, self.layer_norm_bias, config, self.eps)
        return super().forward(x, *args, **kwargs)


class RowLinear(_Sharded, RowParallelLinear):
    """`weight` [out, in / tp], `bias` [out]."""

    shard_dims = {"weight": 1}


class DuplicatedLinear(_Sharded, torch.nn.Module):
    """`weight` [out, in] on every tensor-parallel rank, no communication (Transformer Engine's `duplicated` mode)."""

    tp_group = None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        parallel_mode: str | None = "duplicated",
        skip_bias_add: bool = False,
        **_,
    ):
        super().__init__()
        if parallel_mode != "duplicated":
            raise ValueError(f"parallel_mode {parallel_mode!r}: only 'duplicated' is built here")
        self.skip_bias_add = skip_bias_add
        self.weight = Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.bias = Parameter(torch.empty(output_size, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x):
        bias = None if self.skip_bias_add else self.bias
        return F.linear(x, self.weight, bias), (self.bias if self.skip_bias_add else None)


class GroupedLinear(torch.nn.Module):
    """One linear per local expert: `weight0..` [out, in] with one of the two sharded by expert tensor parallel.

    The token dispatcher does all communication, as with Transformer Engine's GroupedLinear.
    """

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str,
        config: TransformerConfig,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        pg_collection,
        init_method=None,
        tp_comm_buffer_name=None,
        name=None,
    ):
        super().__init__()
        assert is_expert, "grouped linears are expert layers"
        self.num_gemms, self.use_bias, self.skip_bias_add = num_gemms, bias, skip_bias_add
        self.column, self.pg_collection = parallel_mode == "column", pg_collection
        etp = pg_collection.expt_tp.size()
        out_size = divide(output_size, etp) if self.column else output_size
        in_size = input_size if self.column else divide(input_size, etp)
        # Parameters of experts are reduced over the expert data-parallel group when it differs from the dense one.
        expert_groups = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for i in range(num_gemms):
            weight = Parameter(torch.empty(out_size, in_size, dtype=config.params_dtype))
            weight.allreduce = not expert_groups  # type: ignore[attr-defined]
            self.register_parameter(f"weight{i}", weight)
            if bias:
                parameter = Parameter(torch.empty(out_size, dtype=config.params_dtype))
                parameter.allreduce = not expert_groups  # type: ignore[attr-defined]
                self.register_parameter(f"bias{i}", parameter)

    def forward(self, x, tokens_per_expert: list[int]):
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)] if self.use_bias else None
        add = biases if biases is not None and not self.skip_bias_add else [None] * self.num_gemms
        pieces = [
            F.linear(piece, getattr(self, f"weight{i}"), add[i])
            for i, piece in enumerate(torch.split(x, tokens_per_expert))
        ]
        return torch.cat(pieces), (biases if self.skip_bias_add else None)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups, total = self.pg_collection, self.pg_collection.ep.size() * self.num_gemms
        sharded = {}
        for i in range(self.num_gemms):
            expert = (len(sharded_offsets), groups.ep.rank() * self.num_gemms + i, total)
            state = {k: getattr(self, f"{k}{i}") for k in ("weight", "bias") if hasattr(self, f"{k}{i}")}
            axes = {"weight": 0, "bias": 0} if self.column else {"weight": 1}
            one = make_sharded_tensors_for_checkpoint(
                state,
                prefix,
                axes,
                (*sharded_offsets, expert),
                tp_group=groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for key, tensor in one.items():
                tensor.replica_id = (*tensor.replica_id[:2], groups.expt_dp.rank())
                sharded[f"{key}{i}"] = tensor
        return sharded


class CPUSpecProvider(BackendSpecProvider):
    """The modules above, under the method names by which Megatron's spec builders ask for them."""

    def linear(self) -> type:
        return DuplicatedLinear

    def column_parallel_linear(self) -> type:
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        return RowLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False):
        return Norm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool):
        if not moe_use_grouped_gemm:
            raise ValueError("moe_grouped_gemm=False: experts are grouped here, as they are with Transformer Engine")
        fc1: Any = partial(GroupedLinear, parallel_mode="column")
        fc2: Any = partial(GroupedLinear, parallel_mode="row")
        return partial(TEGroupedMLP, submodules=GroupedMLPSubmodules(linear_fc1=fc1, linear_fc2=fc2))

    def activation_func(self):
        return None
