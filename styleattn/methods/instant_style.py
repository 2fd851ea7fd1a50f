"""InstantStyle: an image only where the model keeps style (or layout), its content subtracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from styleattn.references import Layers, Reference, Steps

from ._facts import Facts
from ._images import Images


@dataclass(frozen=True)
class InstantStyle(Images):
    """InstantStyle: IP-Adapter in the blocks of style and of layout, and in no others.

        out = Attn(Q, K_text, V_text) + s_layer · Attn(Q, W_k T, W_v T),
        T = projector(e_image - negative_content_scale · e_content)

    Style is `up_blocks.0.attentions.1` in SDXL and `up_blocks.1` in SD1.5 (experimental); layout is
    `down_blocks.2.attentions.1` in SDXL, `down_blocks.2` and `mid_block` in SD1.5. The subtraction
    is in CLIP's space of images and texts, without normalisation; unconditional rows keep the
    adapter's own "no image".

    On FLUX.1 nobody has published which blocks keep style and which layout; there `blocks` says
    what they get, each or by depth. What was measured on the embedded `tiny-flux` is its preset of
    style and stands in docs/flux-presets.md, with the command that measures another model.

    Args:
        style: s in the layers of style.
        layout: s in the layers of layout.
        blocks: s of other layers, in place of style and layout: a pattern, several, a dictionary of
            patterns to weights ({"transformer_blocks.3": 1.0}), or, on FLUX.1, one weight for every
            double block or for every block, or depths ("double 0-0.5", {"single 0.5-1": 0.3}).
        adapter: an IP-Adapter (`styleattn.adapters`), its file, or a folder with one such file.
            None: the adapters and images of the pipeline's call; style and layout multiply their
            scales.
        negative_content: what the images show and the pictures shall not: a prompt (str), an
            embedding [width], or a picture (PIL, `pathlib.Path`). Needs an adapter of its own that
            takes CLIP's embedding (the kind "base").
        negative_content_scale: how much of it is subtracted.
        steps: when: (start, end) fractions of the run, or a curve of weights.
        references: the images, each with its weight, mask, layers, steps and prompts.
        image_encoder: what encodes pictures, or its folder; None for the pipeline's.
        text_encoder: what encodes the prompt of `negative_content`: a CLIP text model with
            projection and its tokenizer (model, tokenizer), or a folder with both. None for the
            pipeline's; SD1.5 has none, ViT-H adapters of SDXL need another.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Wang et al., InstantStyle, arXiv 2404.02733.
    """

    style: float = 1.0
    layout: float = 0.0
    adapter: Any = None
    negative_content: Any = None
    negative_content_scale: float = 1.0
    steps: Steps = (0.0, 1.0)
    references: tuple[Reference, ...] | None = None
    image_encoder: Any = None
    text_encoder: Any = None
    blocks: Layers | None = None

    name: ClassVar[str] = "instant_style"
    NUMBERS: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[Facts] = Facts(
        paper="InstantStyle: style-preserving text-to-image generation, arXiv 2404.02733",
        modality="text, image",
        route="encoder",
        needs="prompts, a picture, IP-Adapter weights, a CLIP image encoder",
        weights="those of IP-Adapter: h94/IP-Adapter, Apache-2.0",
        hosts="SD 1.x, SDXL, FLUX.1",
    )

    def __post_init__(self) -> None:
        reasons = self._check("style", "layout", "negative_content_scale")
        if not reasons and min(self.style, self.layout) < 0:
            reasons.append(f"style and layout must be >= 0, got {self.style}, {self.layout}")
        if self.blocks is not None and (self.style, self.layout) != (1.0, 0.0):
            reasons.append("blocks stand in place of style and layout; give one or the other")
        content = self.negative_content
        if content is not None and self.adapter is None:
            reasons.append("negative_content needs an adapter of its own")
        if isinstance(content, str) and not content.strip():
            reasons.append("negative_content is an empty prompt")
        if isinstance(content, Tensor) and content.ndim != 1:
            reasons.append(f"negative_content must be [width], got {list(content.shape)}")
        self._refuse(reasons)

    @property
    def layers(self) -> Layers:
        """The weights of the presets, or of the blocks."""
        if self.blocks is not None:
            return self.blocks
        return {"style": float(self.style), "layout": float(self.layout)}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data; of `negative_content` a prompt only, of the rest as
        `IPAdapter`."""
        data = super().to_dict()
        content = self.negative_content
        data["negative_content"] = content if isinstance(content, str) else None
        return data
