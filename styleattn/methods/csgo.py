"""CSGO: content and style, each in a softmax of its own next to the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from styleattn.branch import Branch, Segment

from ._base import Layer
from ._cross import CrossCall, CrossParts, ImagePrompt
from ._driven import ImageDriven, weight_of
from ._facts import Facts

COMPAT = ("", "released")


@dataclass(frozen=True, kw_only=True)
class CSGO(ImageDriven):
    """CSGO: Content-Style Composition in Text-to-Image Generation.

        out = Attn(Q, text) + content_scale * Attn(Q, content) + style_scale * Attn(Q, style)

    Each image acts at the layers for which its adapter has projections: in the paper the content
    at the encoder's, the style at the decoder's, and in a ControlNet the style at its encoder's
    (`adapter.control`), which is where most of the content's structure comes from.

    Args:
        content_scale, style_scale: of the two branches; the style's holds in the ControlNet too.
        compat: "released" is the wiring of the authors' code, where the content has no effect in
            the UNet whatever its scale: it acts through the ControlNet alone. "" is the paper's.
        adapter: has `style`, and `content` and `control` where they are wanted, as `load_csgo`
            returns them; or its file, which acts where `load_csgo` says by itself.
        references: content and style, or style alone.
        layers, steps, image_encoder: as `ImageDriven`; `layers`, of the method and of its
            references, count for the UNet.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Xing et al., CSGO, arXiv 2408.16766, sec. 3.3.
    """

    content_scale: float = 1.0
    style_scale: float = 1.0
    compat: str = ""

    name: ClassVar[str] = "csgo"
    NUMBERS: ClassVar[tuple[str, ...]] = ("content_scale", "style_scale")
    ROLES: ClassVar[tuple[str, ...]] = ("content", "style")
    COMPONENTS: ClassVar[tuple[str, ...]] = ("controlnet",)
    facts: ClassVar[Facts] = Facts(
        paper="CSGO, arXiv 2408.16766",
        modality="text, image",
        route="encoder",
        hosts="SDXL",
        needs="a style picture, a content picture or prompts, the CSGO checkpoint, CLIP"
        " ViT-bigG/14, a tile ControlNet for the content",
        weights="InstantX/CSGO, no licence stated",
    )

    def _reasons(self) -> list[str]:
        if self.compat not in COMPAT:
            return [f"compat must be one of {COMPAT}, got {self.compat!r}"]
        return []

    def adapter_of(self, index: int, component: str = "unet") -> Any:
        """The role's adapter in the UNet; in the ControlNet the style's own."""
        if component == "controlnet":
            return getattr(self.adapter, "control", None) if self._is_style(index) else None
        return super().adapter_of(index, component)

    def reaches(self, layer: Layer, index: int, component: str = "unet") -> bool:
        """Whether a reference acts at a layer."""
        silent = self.compat == "released" and component == "unet" and not self._is_style(index)
        return not silent and super().reaches(layer, index, component)

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """A branch for each image."""
        return CrossParts(branches=tuple(self._branch(p, call) for p in call.prompts))

    def _is_style(self, index: int) -> bool:
        return self.roles[index] == "style"

    def _branch(self, prompt: ImagePrompt, call: CrossCall) -> Branch:
        scale = call.numbers["style_scale" if self._is_style(prompt.index) else "content_scale"]
        segment = Segment(prompt.key, prompt.value, rows=prompt.rows)
        return Branch((segment,), weight=weight_of(prompt, scale, call))
