"""Attention and norms shared within groups of drawings of one style, for those training steps that
ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass
class Groups:
    """How many groups the rows of a batch form, 0 for none, and whether norms are shared too."""

    count: int = 0
    norms: bool = False


def like(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`x` with the mean and standard deviation over its tokens that `reference` has."""
    variance, mean = torch.var_mean(x, -2, keepdim=True)
    wanted_variance, wanted_mean = torch.var_mean(reference, -2, keepdim=True)
    return (x - mean) * ((wanted_variance + 1e-5) / (variance + 1e-5)).sqrt() + wanted_mean


class GroupProcessor:
    """Self-attention in which every row also attends to the first row of its group, as StyleAligned
    does."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows, tokens, _ = hidden_states.shape
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (
            p(hidden_states).view(rows, tokens, attn.heads, -1).transpose(1, 2) for p in projections
        )
        if self.groups.count:
            size = rows // self.groups.count

            def first(x: torch.Tensor) -> torch.Tensor:
                return x[::size].repeat_interleave(size, 0)

            query, key = like(query, first(query)), like(key, first(key))
            key, value = torch.cat([key, first(key)], 2), torch.cat([value, first(value)], 2)
        output = (
            F.scaled_dot_product_attention(query, key, value)
            .transpose(1, 2)
            .reshape(rows, tokens, -1)
        )
        return attn.to_out[1](attn.to_out[0](output))


class GroupedNorm:
    """The forward of a GroupNorm whose statistics are those of a row and of the first of its group
    together, as StyleAligned's shared group norm takes them."""

    def __init__(self, norm: torch.nn.GroupNorm, groups: Groups) -> None:
        self.norm, self.groups = norm, groups

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm, height = self.norm, x.shape[2]
        if self.groups.count and self.groups.norms:
            size = len(x) // self.groups.count
            x = torch.cat([x, x[::size].repeat_interleave(size, 0)], 2)
        y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return y[:, :, :height]


def share_in_groups(unet: Any, groups: Groups) -> None:
    """Let the self-attention and the group norms of the UNet follow `groups`; with no groups the
    result is that of the plain UNet."""
    unet.set_attn_processor(
        {
            name: GroupProcessor(groups) if name.endswith("attn1.processor") else processor
            for name, processor in unet.attn_processors.items()
        }
    )
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = GroupedNorm(module, groups)  # type: ignore[assignment,method-assign]
