"""InstantStyle-Plus: content and style shown by one IP-Adapter, and led by CSD."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from styleattn.branch import Branch, Segment

from ._base import Layer
from ._cross import CrossCall, CrossParts, ImagePrompt
from ._driven import ImageDriven, weight_of
from ._facts import Facts


@dataclass(frozen=True, kw_only=True)
class InstantStylePlus(ImageDriven):
    """InstantStyle-Plus: Style Transfer with Content-Preserving in Text-to-Image Generation.

        out = Attn(Q, text) + content_scale * Attn(Q, content) + style_scale * Attn(Q, style)

    The content acts at every cross-attention layer, the style in the style block alone. The rest is
    the recipe's (`styleattn stylize --method instant_style_plus`): the content's noise by ReNoise,
    a tile ControlNet where the pipeline has one, and the guidance by CSD, which may be off:

        eps <- eps - sqrt(1 - abar_t) * grad_x [ style_guidance * <s(x), s_style>
                                                  + content_guidance * <c(x), c_content> ]

    Args:
        content_scale, style_scale: of the two branches.
        style_guidance, content_guidance: how strongly CSD leads towards the style of the style
            picture, and the content of the content picture; 0 is without.
        csd: CSD's model (`styleattn.adapters.load_csd`), or its file; for the guidance.
        adapter: the IP-Adapter of both pictures, or its file.
        references: content and style, or style alone. A style that names no layers of its own acts
            in "style".
        layers, steps, image_encoder: as `ImageDriven`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Wang et al., InstantStyle-Plus, arXiv 2407.00788; CSD: arXiv 2404.01292.
    """

    content_scale: float = 0.2
    style_scale: float = 1.2
    style_guidance: float = 0.0
    content_guidance: float = 0.0
    csd: Any = None

    name: ClassVar[str] = "instant_style_plus"
    NUMBERS: ClassVar[tuple[str, ...]] = ("content_scale", "style_scale")
    ROLES: ClassVar[tuple[str, ...]] = ("content", "style")
    facts: ClassVar[Facts] = Facts(
        paper="InstantStyle-Plus, arXiv 2407.00788",
        modality="image",
        route="encoder, inversion",
        hosts="SDXL, SD 1.x",
        needs="a content picture and what it shows, a style picture, IP-Adapter weights, a CLIP"
        " image encoder; a tile ControlNet and CSD where they are wanted",
        weights="those of IP-Adapter: h94/IP-Adapter, Apache-2.0; CSD: learn2phoenix/CSD, no"
        " licence stated",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.references:
            *contents, style = self.references
            if style.layers == "all":
                style = replace(style, layers="style")
            object.__setattr__(self, "references", (*contents, style))

    def _reasons(self) -> list[str]:
        reasons = self._wrong_numbers("style_guidance", "content_guidance")
        if not reasons and min(self.style_guidance, self.content_guidance) < 0:
            reasons.append(
                "style_guidance and content_guidance must be >= 0, got"
                f" {self.style_guidance}, {self.content_guidance}"
            )
        if not reasons and self.guided and self.csd is None:
            reasons.append("style_guidance and content_guidance need csd, CSD's model or its file")
        return reasons

    @property
    def guided(self) -> bool:
        """Whether CSD leads."""
        return self.style_guidance > 0 or self.content_guidance > 0

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data; a model of CSD's is none and becomes None."""
        data = super().to_dict()
        is_path = isinstance(self.csd, (str, os.PathLike))
        data["csd"] = os.fspath(self.csd) if is_path else None
        return data

    def adapter_of(self, index: int, component: str = "unet") -> Any:
        """One adapter for both pictures, in the UNet."""
        return self.adapter if component == "unet" else None

    def reaches(self, layer: Layer, index: int, component: str = "unet") -> bool:
        """Whether a picture acts at a layer of the component."""
        return component == "unet"

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """A branch for each picture."""
        return CrossParts(branches=tuple(self._branch(p, call) for p in call.prompts))

    def _branch(self, prompt: ImagePrompt, call: CrossCall) -> Branch:
        scale = call.numbers[f"{self.roles[prompt.index]}_scale"]
        segment = Segment(prompt.key, prompt.value, rows=prompt.rows)
        return Branch((segment,), weight=weight_of(prompt, scale, call))
