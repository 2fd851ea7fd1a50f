"""What the methods that put another image's features into joint attention have in common.

Image tokens only: the queries of the image read image tokens of a reference row, rotated to their
own places in the reference, which are those of the image; text keeps reading its own image.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from styleattn.branch import Segment

from ._base import Number, off
from ._injection import whole
from ._joint import JointCall, Part, Parts


def swapped(
    call: JointCall,
    parts: Parts,
    reference: int,
    *,
    logit_scale: Number = 1.0,
    query: Tensor | None = None,
) -> Parts:
    """The image's queries read the keys and values of a reference's image tokens in place of the
    image's own; reference rows attend as ever.

        out = share * Attn(Q', text + theirs) + (1 - share) * Attn(Q, text + own)

    Args:
        logit_scale: of their keys; the text's logits are as ever.
        query: Q', [B, H, N, D], rotated; None for the image's own.
    """
    image = parts["image"]
    mine = [b if is_one else -1 for b, is_one in enumerate(call.rows.is_reference())]
    own = replace(image.segments["image"], rows=torch.tensor(mine))
    style = replace(theirs(call, image, reference), logit_scale=logit_scale)
    seen = {**image.segments, "image": own, f"style {reference}": style}
    share = share_of(call, reference)
    part = replace(image, query=image.query if query is None else query, segments=seen)
    if not whole(share):
        part = replace(part, share=per_row(call, share, 1.0), rest=image)
    return {**parts, "image": part}


def theirs(call: JointCall, image: Part, reference: int) -> Segment:
    """The keys and values of a reference's image tokens, for the rows that are none."""
    rows = torch.tensor(call.rows.serving(reference))
    return replace(image.segments["image"], rows=rows)


def share_of(call: JointCall, reference: int) -> Number:
    """The strength of a reference, times its mask: a number, or [N] per image token."""
    strength, mask = call.strengths[reference], call.masks[reference]
    return strength if mask is None else strength * mask


def per_row(call: JointCall, share: Number, references: float) -> Tensor:
    """[B] or [B, N]: a share of the image's tokens for ordinary rows, another number for reference
    rows."""
    return call.rows.numbers(share, references, call.tokens["image"].value.device)


def kept_query(call: JointCall, image: Part, reference: int, keep: Number) -> Tensor:
    """Q' = keep * Q_reference + (1 - keep) * Q of the image's tokens, mixed in fp32; the queries
    stand at the same places, so that it is the same before and after the rotation."""
    if off(keep):
        return image.query
    pairs = enumerate(call.rows.serving(reference))
    index = torch.tensor([b if row < 0 else row for b, row in pairs], device=image.query.device)
    share = per_row(call, keep, 0.0)
    share = share[:, None, :, None] if share.ndim == 2 else share[:, None, None, None]
    wide = torch.promote_types(image.query.dtype, torch.float32)
    own = image.query.to(wide)
    mixed = torch.lerp(own, own.index_select(0, index), share.to(wide))
    return mixed.to(image.query.dtype)
