"""FLUX attention shared within groups of drawings of one style, for those training steps that ask
for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .flux_model import GRID, TOKENS, image_ids
from .shared_training import like


@dataclass
class FluxGroups:
    """How many groups the rows of a batch form, 0 for none, and how the first row of a group is
    shared.

    `aligned`: as AlignedGen does, in the single blocks, with AdaIN before the rotation and the
    reference one picture to the right; otherwise as StyleAligned does, in all blocks, with AdaIN
    after the rotation and the reference in place.
    """

    count: int = 0
    aligned: bool = False
    moved: tuple[torch.Tensor, torch.Tensor] | None = None


class FluxGroupProcessor:
    """FLUX attention in which the image tokens of every row also attend to those of the first row
    of its group; with no groups it is the plain attention."""

    def __init__(self, groups: FluxGroups) -> None:
        self.groups = groups

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        query, key, value = projected(attn, hidden_states, encoder_hidden_states)
        groups, double = self.groups, encoder_hidden_states is not None
        text = query.shape[2] - TOKENS
        if groups.count and not (groups.aligned and double):
            output = _shared(groups, query, key, value, text, image_rotary_emb)
        else:
            query, key = rotated(query, image_rotary_emb), rotated(key, image_rotary_emb)
            output = F.scaled_dot_product_attention(query, key, value)
        output = output.transpose(1, 2).flatten(2)
        if not double:
            return output
        image = attn.to_out[1](attn.to_out[0](output[:, text:]))
        return image, attn.to_add_out(output[:, :text])


def projected(
    attn: Any, hidden: torch.Tensor, context: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [B, H, text + image, D], normed, not rotated."""

    def heads(projection: Any, x: torch.Tensor) -> torch.Tensor:
        return projection(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)

    query, key = attn.norm_q(heads(attn.to_q, hidden)), attn.norm_k(heads(attn.to_k, hidden))
    value = heads(attn.to_v, hidden)
    if context is not None:
        added_query = attn.norm_added_q(heads(attn.add_q_proj, context))
        added_key = attn.norm_added_k(heads(attn.add_k_proj, context))
        query, key = torch.cat([added_query, query], 2), torch.cat([added_key, key], 2)
        value = torch.cat([heads(attn.add_v_proj, context), value], 2)
    return query, key, value


def rotated(x: torch.Tensor, angles: Any) -> torch.Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, angles, sequence_dim=2)


def _shared(
    groups: FluxGroups,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    text: int,
    angles: Any,
) -> torch.Tensor:
    """The first row of a group attends to itself; the others to themselves and to its image
    tokens."""
    size = len(query) // groups.count
    others = torch.arange(len(query)).view(groups.count, size)[:, 1:].flatten()

    def styled(x: torch.Tensor) -> torch.Tensor:
        image = x[:, :, text:]
        return torch.cat([x[:, :, :text], like(image, first(image))], 2)

    def first(x: torch.Tensor) -> torch.Tensor:
        return x[::size].repeat_interleave(size, 0)

    if groups.aligned:
        query, key = styled(query), styled(key)
        shared_key = rotated(key[::size, :, text:], groups.moved)
        query, key = rotated(query, angles), rotated(key, angles)
    else:
        query, key = styled(rotated(query, angles)), styled(rotated(key, angles))
        shared_key = key[::size, :, text:]
    own = F.scaled_dot_product_attention(query[::size], key[::size], value[::size])
    shared_key = shared_key.repeat_interleave(size - 1, 0)
    shared_value = value[::size, :, text:].repeat_interleave(size - 1, 0)
    rest = F.scaled_dot_product_attention(
        query[others],
        torch.cat([key[others], shared_key], 2),
        torch.cat([value[others], shared_value], 2),
    )
    joined = torch.cat([own[:, None], rest.unflatten(0, (groups.count, size - 1))], 1)
    return joined.flatten(0, 1)


def share_flux_in_groups(transformer: Any, groups: FluxGroups) -> None:
    """Let the attention of the transformer follow `groups`; with no groups the result is that of
    the plain transformer."""
    ids = image_ids()
    ids[:, 2] += GRID
    groups.moved = transformer.pos_embed(ids)
    transformer.set_attn_processor(FluxGroupProcessor(groups))
