"""Z-STAR: content and style in one softmax, in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from styleattn.attention import attention
from styleattn.branch import Branch, Segment
from styleattn.references import Steps

from ._base import Number, SelfCall, log
from ._facts import Facts
from ._injection import Injection, serving


@dataclass(frozen=True, kw_only=True)
class ZStar(Injection):
    """Z-STAR: Zero-shot Style Transfer via Attention Rearrangement.

        out       = softmax( sigma * [ 1.2 * Q K_style^T , Q K^T ] ) [ V_style ; V ]
        out_style = softmax( sigma * [ 1.5 * Q_style K^T , Q_style K_style^T ] ) [ V ; V_style ]

    The image starts from the content's noise, so that its own queries, keys and values are the
    content's. The style's weight w adds log w to the logits between the two. The authors' null-text
    optimisation is not part of this: the recipe runs without guidance, where no unconditional text
    takes part.

    Args:
        style_scale: of the logits of an image with the style.
        content_scale: of the logits of the style with the image.
        rearrange_style: the style's row looks at the image too, as in the official code; there can
            be one image only then. False leaves that row alone.
        layers: as `Injection`; "late" is the official choice on SD 1.x.
        steps: as `Injection`; by default from the fourth of fifty on.
        references: as `Injection`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Deng et al., Z*: Zero-shot Style Transfer via Attention Rearrangement, arXiv 2311.16491.
    """

    style_scale: float = 1.2
    content_scale: float = 1.5
    rearrange_style: bool = True
    steps: Steps = (0.08, 1.0)

    name: ClassVar[str] = "z_star"
    NUMBERS: ClassVar[tuple[str, ...]] = ("style_scale", "content_scale")
    facts: ClassVar[Facts] = Facts(
        paper="Z*: Zero-shot Style Transfer via Attention Rearrangement, arXiv 2311.16491",
        modality="image",
        route="inversion, attention",
        needs="a content picture, a style picture",
    )

    def _reasons(self) -> list[str]:
        found = [self._number("style_scale"), self._number("content_scale")]
        found += self._wrong_flags("rearrange_style")
        return [reason for reason in found if reason]

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        self._check(call)
        rows, bias, mask = serving(call, 0), log(call.strengths[0]), call.masks[0]
        scale = call.numbers["style_scale"]
        seen: Number = bias if mask is None else (bias + mask).expand(len(rows), -1)
        own = Segment(call.key, call.value, key_bias=call.key_bias)
        segments = [self._segment(call, rows, scale, seen), own]
        if self.rearrange_style:
            images = self._image_of_style(call)
            segments.append(self._segment(call, images, call.numbers["content_scale"], bias))
        out = attention(
            call.query,
            (Branch(tuple(segments)),),
            softmax_scale=call.softmax_scale,
            backend=call.backend,
        )
        assert isinstance(out, Tensor)
        return out

    @staticmethod
    def _segment(call: SelfCall, rows: Tensor, scale: Number, bias: Number) -> Segment:
        return Segment(
            call.key,
            call.value,
            rows=rows,
            logit_scale=scale,
            logit_bias=bias,
            key_bias=call.key_bias,
        )

    @staticmethod
    def _image_of_style(call: SelfCall) -> Tensor:
        """int [B]: for the style's row of each chunk the image's row; -1 for other rows."""
        layout = call.rows
        images = [r for r in range(layout.count) if r not in layout.references]
        if len(images) != 1:
            raise ValueError(
                f"ZStar: the style looks at one image, this call has {len(images)}; make one at a"
                " time, or set rearrange_style=False"
            )
        pairs = [(c, r) for c in range(layout.chunks) for r in range(layout.count)]
        style = layout.references[0]
        return torch.tensor([c * layout.count + images[0] if r == style else -1 for c, r in pairs])
