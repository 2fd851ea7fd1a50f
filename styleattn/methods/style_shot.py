"""StyleShot: tokens of a picture's patches, in a softmax of their own next to the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._driven import ImageDriven
from ._facts import Facts


@dataclass(frozen=True, kw_only=True)
class StyleShot(ImageDriven):
    """StyleShot: A Snapshot on Any Style.

        out = Attn(Q, K_text, V_text) + scale * Attn(Q, W_k T, W_v T)

    T are six tokens of the style-aware encoder, two for each of three sizes of patches.

    Args:
        scale: of the style; 0 is the model without it.
        adapter: what makes tokens and keys, as `load_styleshot` returns it.
        image_encoder: StyleShot's style-aware encoder (`styleattn.adapters`), or its file.
        layers, steps, references: as `ImageDriven`. `embeds` are outputs [3, 1024] of the
            style-aware encoder.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Gao et al., StyleShot, arXiv 2407.01414, sec. 3.2.
    """

    scale: float = 1.0

    name: ClassVar[str] = "style_shot"
    facts: ClassVar[Facts] = Facts(
        paper="StyleShot: A Snapshot on Any Style, arXiv 2407.01414",
        modality="text, image",
        route="encoder",
        hosts="SD 1.x",
        needs="prompts, a style picture, the StyleShot checkpoint and its style-aware encoder",
        weights="Gaojunyao/StyleShot, MIT as its code",
    )
