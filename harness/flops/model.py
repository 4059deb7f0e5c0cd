"""A whole model: which blocks it has, layer by layer, multi-token prediction, and the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.flops import blocks, recurrent
from harness.flops.fields import Fields, FlopsError, linear_attention_layers, moe_layers
from harness.flops.run import Convention, Flops, Kernels, Part, Run, sequences


def flops(
    config: Any,
    *,
    seq: int,
    batch: int = 1,
    packed: Sequence[int] | None = None,
    convention: Convention = "causal",
    kernels: Kernels = "torch",
) -> Flops:
    """FLOPs of one forward and backward of `batch` sequences of `seq` tokens, without recomputation of activations.

    `packed`: each sequence holds documents of these lengths, which do not see each other; padding is not counted.
    `convention` and `kernels`: see Run. Raises FlopsError for a configuration or a batch that cannot be counted.
    """
    run = Run(sequences(seq, batch, packed), convention, kernels)
    f = Fields(config)
    if f.flag("is_hybrid_model"):
        parts = _hybrid(f, run)
    elif f.flag("heterogeneous_block_specs"):
        parts = _heterogeneous(f, run)
    else:
        parts = _decoder(f, run)
    return Flops(run, (*parts, *_logits(f, run, "logits", "output")))


def _decoder(f: Fields, run: Run) -> list[Part]:
    """Attention and feed-forward in every layer; an MTP depth has a layer of the last one's kind."""
    experts, linear = moe_layers(f), linear_attention_layers(f)
    parts: list[Part] = []
    for i, (has_experts, is_linear) in enumerate(zip(experts, linear, strict=True)):
        parts += _layer(f, run, f"layers.{i}", i + 1, has_experts, is_linear)
    for depth in range(f.optional("mtp_num_layers", least=0) or 0):
        place = f"mtp.{depth}"
        # Megatron counts the layers of MTP from 1 again: that number decides about a window.
        parts += _mtp(f, run, place, _layer(f, run, place, depth + 1, experts[-1], linear[-1]))
    return parts


def _layer(f: Fields, run: Run, place: str, number: int, has_experts: bool, is_linear: bool) -> list[Part]:
    return [
        *(recurrent.gated_delta_net(f, run, place) if is_linear else _softmax_attention(f, run, place, number)),
        *(blocks.moe(f, run, place) if has_experts else blocks.dense_mlp(f, run, place)),
    ]


def _softmax_attention(f: Fields, run: Run, place: str, number: int) -> list[Part]:
    variant = f.get("experimental_attention_variant")
    if variant == "dsa":
        return blocks.sparse_attention(f, run, place, number)
    if variant not in (None, "gated_delta_net"):
        raise FlopsError(f"experimental_attention_variant {variant!r} is not known: gated_delta_net, dsa or None")
    return (blocks.latent_attention if f.flag("multi_latent_attention") else blocks.attention)(f, run, place, number)


def _mtp(f: Fields, run: Run, place: str, block: list[Part]) -> list[Part]:
    """One depth: [hidden ; next embedding] -> hidden, a block, and the model's own head once more."""
    h = f.integer("hidden_size")
    head = _logits(f, run, "mtp_head", place)
    if f.flag("mtp_detach_heads"):  # the head's weight is detached: no gradient for it
        head = [Part(p.name, p.place, p.forward, p.forward, p.replicated) for p in head]
    return [run.linear("mtp_proj", place, 2 * h, h), *block, *head]


def _logits(f: Fields, run: Run, name: str, place: str) -> list[Part]:
    """The head. Rows that pad the vocabulary run and predict nothing: hardware work, and a part of their own."""
    h, vocab = f.integer("hidden_size"), f.integer("vocab_size")
    parts = [run.linear(name, place, h, vocab)]
    if run.hardware:
        padded = f.integer("padded_vocab_size")
        if padded < vocab:
            raise FlopsError(f"padded_vocab_size {padded} is less than vocab_size {vocab}")
        if padded > vocab:
            parts.append(run.linear(f"{name}_padding", place, h, padded - vocab))
    return parts


# -- layers that differ ----------------------------------------------------------------------------------------------


def _heterogeneous(f: Fields, run: Run) -> list[Part]:
    """Layers after `per_block_parameters` (Nemotron-NAS): a block, its own width, one square matrix, or nothing."""
    layers, h = f.integer("num_layers"), f.integer("hidden_size")
    per_block = f.get("per_block_parameters")
    if len(per_block) != layers:
        raise FlopsError(f"per_block_parameters has {len(per_block)} entries, the model {layers} layers")
    parts: list[Part] = []
    for i, block in enumerate(per_block):
        place, a, m = f"layers.{i}", Fields(block.attention), Fields(block.mlp)
        if a.flag("replace_with_linear"):
            parts.append(run.linear("attention_linear", place, h, h))
        elif not a.flag("no_op"):
            parts += blocks.attention(f, run, place, i + 1, a.optional("num_query_groups"))
        if m.flag("replace_with_linear"):
            parts.append(run.linear("mlp_linear", place, h, h))
        elif not m.flag("no_op"):
            parts += blocks.dense_mlp(f, run, place, m.optional("ffn_hidden_size"))
    return parts


def _hybrid(f: Fields, run: Run) -> list[Part]:
    """One block a letter of `hybrid_layer_pattern`: `M*-E/M-` is four layers and one MTP depth of two."""
    from megatron.core.models.hybrid.hybrid_layer_allocation import parse_hybrid_pattern

    pattern = f.get("hybrid_layer_pattern")
    if not isinstance(pattern, str) or not pattern:
        raise FlopsError(f"hybrid_layer_pattern is {pattern!r}: letters such as 'M*-E' are needed")
    try:
        parsed = parse_hybrid_pattern(pattern)
    except ValueError as error:
        raise FlopsError(f"hybrid_layer_pattern {pattern!r}: {error}") from None
    main = (parsed.main_pattern or "").replace("|", "")
    if len(main) != f.integer("num_layers"):
        raise FlopsError(
            f"hybrid_layer_pattern {pattern!r} has {len(main)} layers, num_layers is {f.get('num_layers')}"
        )
    parts: list[Part] = []
    for i, letter in enumerate(main):
        parts += _letter(f, run, f"layers.{i}", i + 1, letter)
    for depth in range(parsed.mtp_num_depths):
        place = f"mtp.{depth}"
        inner = [p for i, letter in enumerate(parsed.mtp_pattern or "") for p in _letter(f, run, place, i + 1, letter)]
        parts += _mtp(f, run, place, inner)
    return parts


def _letter(f: Fields, run: Run, place: str, number: int, letter: str) -> list[Part]:
    match letter:
        case "M":
            return recurrent.mamba(f, run, place)
        case "G":
            return recurrent.gated_delta_net(f, run, place)
        case "*":
            return blocks.attention(f, run, place, number)
        case "D":
            return blocks.sparse_attention(f, run, place, number)
        case "+":
            return blocks.latent_attention(f, run, place, number)
        case "-":
            return blocks.dense_mlp(f, run, place)
        case "E":
            return blocks.moe(f, run, place)
    raise FlopsError(f"layer letter {letter!r} is not known")  # Megatron has a new one
