"""Providers: a Megatron-Core configuration that can build its own model, on a CPU or on a GPU.

A provider *is* a TransformerConfig with the model's vocabulary, rope and pipeline split beside it. It stays editable until
`finalize()`, which derives, validates and locks it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from bridges.conversion.walk import Walk
from bridges.layout import Layout
from bridges.providers import lock, pipeline, routing
from bridges.providers.groups import ensure_process_groups
from bridges.providers.rope import Rotary, inverse_frequencies, scale_rotation


@dataclass
class GPTModelProvider(TransformerConfig):
    """A decoder-only language model. Defaults are those of today's dense models: RMSNorm, SwiGLU, rope, no biases.

    Raises ValueError from `finalize()` for sizes that do not divide, and from `provide*` when it was not finalized.
    """

    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
    activation_func: Callable = F.silu
    add_bias_linear: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    ffn_hidden_size: int | None = None

    vocab_size: int = 0
    make_vocab_size_divisible_by: int = 1
    max_position_embeddings: int = 2048
    seq_length: int = 2048
    share_embeddings_and_output_weights: bool = False
    position_embedding_type: str = "rope"
    # Where the layers and what is in them stand; another model class says it otherwise.
    walk: ClassVar[Walk] = Walk()

    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: dict | None = None  # hub-style, without rope_theta
    num_layers_per_chunk: tuple[int, ...] | None = None  # explicit pipeline split, see Layout.split

    # Experts are grouped, exchanged by all-to-all and never dropped; balancing losses belong to training recipes.
    moe_grouped_gemm: bool = True
    moe_token_dispatcher_type: str = "alltoall"
    moe_router_load_balancing_type: str = "none"
    moe_aux_loss_coeff: float = 0.0
    moe_shared_expert_gate: bool = False
    # A group of experts scores the sum of this many of its best; None: topk // group_topk, as Megatron has it.
    moe_router_group_best: int | None = None

    # Fusions need GPU kernels and change nothing that a parity check looks at.
    bias_activation_fusion: bool = False
    bias_dropout_fusion: bool = False
    masked_softmax_fusion: bool = False
    apply_rope_fusion: bool = False
    gradient_accumulation_fusion: bool = False
    persist_layer_norm: bool = False

    def __post_init__(self) -> None:
        """TransformerConfig validates here; a provider waits for finalize(), since users still edit it."""
        self._final = False
        # Set by AutoBridge: fills the chunks of a model from the checkpoint it was made for.
        self.weight_loader: Callable[[list], None] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        lock.check(self, name)
        super().__setattr__(name, value)

    # -- derived -----------------------------------------------------------------------------------------------------

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // (self.num_query_groups or self.num_attention_heads)

    @property
    def layout(self) -> Layout:
        """The model-parallel layout that the provider's fields say (dp is not a model's business)."""
        return Layout(
            tp=self.tensor_model_parallel_size,
            pp=self.pipeline_model_parallel_size,
            vpp=self.virtual_pipeline_model_parallel_size or 1,
            ep=self.expert_model_parallel_size,
            etp=self.expert_tensor_parallel_size,
            cp=self.context_parallel_size,
            sp=self.sequence_parallel,
            split=self.num_layers_per_chunk,
        )

    def apply_layout(self, layout: Layout | str) -> GPTModelProvider:
        """Set every parallel size from a layout; returns self."""
        layout = Layout.parse(layout)
        if self._final:
            raise lock.locked("its layout")
        self.tensor_model_parallel_size = layout.tp
        self.pipeline_model_parallel_size = layout.pp
        self.virtual_pipeline_model_parallel_size = layout.vpp if layout.vpp > 1 else None
        self.expert_model_parallel_size = layout.ep
        self.expert_tensor_parallel_size = layout.expert_tp
        self.context_parallel_size = layout.cp
        self.sequence_parallel = layout.sp
        self.num_layers_per_chunk = layout.split
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rows Megatron holds: the next multiple of make_vocab_size_divisible_by x tp."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def check_layout(self) -> None:
        """Raise LayoutError when the model does not divide into the layout."""
        self.layout.check(
            num_layers=self.num_layers,
            num_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups or self.num_attention_heads,
            ffn=self.ffn_hidden_size or 4 * self.hidden_size,
            num_experts=self.num_moe_experts,
            moe_ffn=self.moe_ffn_hidden_size,
            shared_ffn=self.moe_shared_expert_intermediate_size,
        )

    # -- life cycle --------------------------------------------------------------------------------------------------

    def finalize(self) -> GPTModelProvider:
        """Derive and validate everything; after this the parallel sizes are fixed. Calling it twice is fine."""
        if self._final:
            return self
        if self.get_transformer_config() is not self:
            raise lock.ProviderError(
                f"{type(self).__name__}.get_transformer_config() returns another object than the provider, which is the "
                "configuration: change the one that super().get_transformer_config() returns, and return that"
            )
        pipeline.read_settings(self)
        self.use_cpu_initialization = not torch.cuda.is_available()
        if self.pipeline_model_parallel_size > 1 and self.pipeline_dtype is None:
            self.pipeline_dtype = self.params_dtype
        self.check_layout()
        chunks = [["decoder"] * len(layers) for layers in self.layout.chunk_layers(self.num_layers)]
        chunks[-1] += ["mtp"] * (self.mtp_num_layers or 0)
        if self.pipeline_model_parallel_size > 1:
            # Always explicit: uneven splits, virtual stages and MTP stages are then one mechanism.
            chunks[0].insert(0, "embedding")
            chunks[-1].append("loss")
            self.pipeline_model_parallel_layout = chunks
        routing.check(self)
        biased_softmax = routing.biased_softmax(self)
        self.moe_router_enable_expert_bias &= (
            not biased_softmax
        )  # Megatron refuses what bridges.providers.routing adds to it
        super().__post_init__()
        self.moe_router_enable_expert_bias |= biased_softmax
        self.rope_frequencies()  # an unknown kind of rope should fail here, not in the forward
        self._final = True
        return self

    def get_transformer_config(self) -> TransformerConfig:
        """The Megatron-Core configuration; a provider is one itself. finalize() calls it first: what an override sets counts."""
        return self

    def rope_frequencies(self) -> torch.Tensor | None:
        """Inverse rope frequencies [rotary dim / 2] in fp32; None where the attention layers have a rope of their own."""
        return self._rope()[0]

    def _rope(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, and the factor on cos and sin (yarn's attention factor)."""
        dim = self.kv_channels or self.hidden_size // self.num_attention_heads
        return inverse_frequencies(
            base=self.rotary_base,
            dim=dim,
            scaling=self.rope_scaling,
            percent=self.rotary_percent,
            max_position_embeddings=self.max_position_embeddings,
        )

    def layer_spec(self, vp_stage: int | None) -> Any:
        """Megatron's own block spec; on a CPU its Transformer Engine modules are those of bridges.providers.cpu_backend."""
        block = gpt_layer_specs.get_gpt_decoder_block_spec(self, use_transformer_engine=True, vp_stage=vp_stage)
        self._edit(block.layer_specs)
        self.edit_block(block)
        return block

    def _edit(self, specs: Any) -> Any:
        for spec in {id(spec): spec for spec in specs}.values():  # layers of one kind share one
            self.edit_layer(spec)
        return specs

    def edit_layer(self, spec: Any) -> None:
        """Mechanisms change Megatron's spec of a kind of layer here, and call super's."""

    def edit_block(self, block: Any) -> None:
        """Mechanisms change what the decoder has beside its layers (the final norm) here, and call super's."""

    def finish(self, model: Any) -> None:
        """Mechanisms change a built chunk here, and call super's."""

    def mtp_spec(self, vp_stage: int | None) -> Any:
        """The heads of multi-token prediction, where this chunk has them; each runs a layer like the decoder's last."""
        if not self.mtp_num_layers:
            return None
        last = self.all_layer_specs()[-1]
        return gpt_layer_specs.get_gpt_mtp_block_spec(self, last, use_transformer_engine=True, vp_stage=vp_stage)

    def all_layer_specs(self) -> Any:
        """The specs of all decoder layers, on whatever stage they are."""
        return self._edit(gpt_layer_specs.get_gpt_decoder_layer_specs(self, use_transformer_engine=True))

    def get_layer_spec(self) -> Any:
        """What the decoder's layers are made of: anything that `transformer_layer_spec` may be. Override it to build others."""
        return self.layer_spec

    def _layer_spec(self, given: Any, vp_stage: int | None) -> Any:
        spec = self.get_layer_spec() if given is None else given
        if not callable(spec):
            return spec
        names = list(inspect.signature(spec).parameters)
        config = [self] if names and names[0] != "vp_stage" else []
        return spec(*config, **({"vp_stage": vp_stage} if "vp_stage" in names else {}))

    def provide(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        transformer_layer_spec: Any = None,
    ) -> GPTModel:
        """One model chunk for this rank (process groups must exist).

        `transformer_layer_spec` is Megatron's spec of a layer or of a block, or a function that makes one of the
        configuration and `vp_stage`, as far as it takes them; None: what get_layer_spec() returns.
        """
        if not self._final:
            raise ValueError(
                "call provider.finalize() before building a model: it validates and locks the configuration"
            )
        if self.vocab_size < 1:
            raise ValueError(f"provider.vocab_size is {self.vocab_size}: set it before building a model")
        model = GPTModel(
            config=self,
            transformer_layer_spec=self._layer_spec(transformer_layer_spec, vp_stage),
            mtp_block_spec=self.mtp_spec(vp_stage),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=self.rotary_percent,
            rotary_base=int(self.rotary_base),
            vp_stage=vp_stage,
        )
        if self.share_embeddings_and_output_weights and model.mtp_process and post_process:
            # The head reads the embedding there. Megatron 0.19 allocates a weight all the same where this is not the first
            # stage, never reads it, and fails to save the model because of it.
            model.output_layer.weight = None
        if (frequencies := self.rope_frequencies()) is not None:
            model.rotary_pos_emb = Rotary(
                frequencies, interleaved=self.rotary_interleaved, cp_group=model.pg_collection.cp
            )
            scale_rotation(model, self._rope()[1])
        routing.install(model, self)
        self.finish(model)
        return model

    def provide_chunks(self, transformer_layer_spec: Any = None) -> list:
        """This rank's model chunks, one per virtual stage, where Megatron's groups exist; on torch's default device."""
        vpp = self.virtual_pipeline_model_parallel_size
        chunks = []
        for stage in range(vpp or 1):
            at = {"vp_stage": stage, "ignore_virtual": False} if vpp else {}
            chunk = self.provide(
                pre_process=parallel_state.is_pipeline_first_stage(**at),
                post_process=parallel_state.is_pipeline_last_stage(**at),
                vp_stage=stage if vpp else None,
                **({} if transformer_layer_spec is None else {"transformer_layer_spec": transformer_layer_spec}),
            )
            chunks.append(chunk)
        return chunks

    def provide_distributed_model(self, wrap_with_ddp: bool = True, *, transformer_layer_spec: Any = None) -> list:
        """This rank's model chunks, one per virtual stage; process groups are made when there are none.

        Without torchrun's environment a world of one rank is made. With `wrap_with_ddp` each chunk is wrapped in
        Megatron's DistributedDataParallel. `transformer_layer_spec` is as in `provide`.
        """
        ensure_process_groups(self)
        chunks = self.provide_chunks(transformer_layer_spec)
        if torch.cuda.is_available():
            for chunk in chunks:
                chunk.cuda()
        if self.weight_loader is not None:
            self.weight_loader(chunks)
        if wrap_with_ddp:
            ddp_config = DistributedDataParallelConfig()
            chunks = [DistributedDataParallel(self, ddp_config, chunk) for chunk in chunks]
        return chunks
