"""How a token chooses its experts where the published rule is not Megatron-Core's.

Megatron scores a group of experts by the sum of its best `topk // group_topk` and adds an expert bias to sigmoid scores
only. DeepSeek-V2 scores a group by its best expert, DeepSeek-V3 by its best two whatever topk is, and ERNIE-4.5 adds the
bias to softmax scores (transformers' `DeepseekV2TopkRouter`, `DeepseekV3TopkRouter`, `Ernie4_5_MoeTopKRouter`).

Where a `TopKRouter` has a `router_replay`, Megatron lets it pick the experts and does everything else (weights, scaling,
dispatch) itself. A `Choice` takes that place: it computes instead of replaying. It is given to the routers of those
models only whose provider asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


def biased_softmax(config) -> bool:
    """Is an expert bias added to softmax scores? Megatron's validation refuses that, since its router would ignore it."""
    return config.moe_router_enable_expert_bias and config.moe_router_score_function == "softmax"


def own_choice(config) -> bool:
    """Does the model need a `Choice`?"""
    return config.moe_router_group_best is not None or biased_softmax(config)


def check(config) -> None:
    """ValueError for settings that would bypass a model's own choice of experts."""
    for name in ("moe_router_fusion", "moe_enable_routing_replay"):
        if own_choice(config) and getattr(config, name):
            raise ValueError(f"{name} = True: this model's choice of experts is not Megatron's own, which {name} needs")


def install(model: torch.nn.Module, config) -> None:
    """Give every router of `model` the choice that its config asks for."""
    if own_choice(config):
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.router_replay = Choice(module)  # type: ignore[assignment]


class Choice:
    """The experts of each token: the best by (biased) score, from the best groups where there are groups."""

    def __init__(self, router: TopKRouter):
        self.router = router

    def get_replay_topk(
        self, values: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(values [tokens, topk] of the chosen, their numbers). Megatron gives logits where it takes the softmax over the
        chosen ones alone, else scores [tokens, experts], to which it has added a sigmoid router's bias."""
        config: Any = self.router.config
        softmax = config.moe_router_score_function == "softmax"
        logits = softmax and not config.moe_router_pre_softmax
        scores = torch.softmax(values, dim=-1, dtype=torch.float32) if logits else values
        if softmax and self.router.expert_bias is not None:
            scores = scores + self.router.expert_bias
        if group_topk:
            grouped = scores.unflatten(-1, (num_groups, -1))  # type: ignore[arg-type]
            best = config.moe_router_group_best or topk // group_topk
            chosen = grouped.topk(best, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
            others = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, chosen, False)
            scores = grouped.masked_fill(others.unsqueeze(-1), float("-inf")).flatten(-2)
        experts = scores.topk(topk, dim=-1).indices
        return values.gather(-1, experts), experts
