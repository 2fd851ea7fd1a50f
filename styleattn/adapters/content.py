"""InstantStyle's subtraction of a picture's content in the space of CLIP's embeddings."""

from __future__ import annotations

import math

from torch import Tensor

from styleattn.errors import describe, invalid

from ._adapter import Encoder


def subtract_content(
    embeds: Tensor, content: Tensor, *, scale: float = 1.0, encoder: Encoder | None = None
) -> Tensor:
    """Image embeddings with a content taken out: `e - scale * c`, neither side normalised.

    The content is any embedding of the same CLIP model: a prompt's projected text embedding (for
    SDXL's ViT-bigG adapter, the pooled output of the second text encoder), a picture's image
    embedding, or a tensor of one's own.

    Args:
        embeds: [R, width], projected image embeddings.
        content: [width], [1, width] or [R, width].
        scale: how much of it; the paper's demos use 0.5 to 1.
        encoder: of the adapter that will take the result, to be checked as well.

    Raises:
        Invalid: shapes that do not fit, a scale that is not finite, or an adapter that does not
            take projected embeddings; all reasons at once.

    Source: InstantStyle (arXiv 2404.02733), section 3.2.
    """
    reasons = []
    if embeds.dim() != 2:
        reasons.append("embeds must be [R, width]: projected embeddings, not hidden states")
    elif content.shape not in (embeds.shape[1:], (1, embeds.shape[1]), embeds.shape):
        reasons.append("content must be [width], [1, width] or [R, width], as embeds are")
    if not math.isfinite(scale):
        reasons.append(f"scale must be finite, got {scale}")
    if encoder is not None and encoder.output != "embeds":
        reasons.append(
            f"the adapter takes {encoder.output!r} of {encoder.tower}, not its projected embedding"
        )
    elif encoder is not None and embeds.shape[-1] != encoder.width:
        reasons.append(f"the adapter takes embeddings of width {encoder.width}")
    if reasons:
        inputs = f"embeds {describe(embeds)}, content {describe(content)}"
        raise invalid("subtract_content", reasons, inputs)
    return embeds - scale * content.to(embeds)
