"""StyleStudio: the text's output under the style's statistics, and a teacher that keeps the
layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from styleattn.branch import Branch, Segment
from styleattn.references import Layers, Steps
from styleattn.statistics import token_stats

from ._base import SelfCall
from ._cross import CrossCall, CrossParts
from ._driven import ImageDriven, of_seeing, over_heads, weight_of, wide
from ._facts import Facts
from ._injection import Injection, attend, of_reference, share_of

_EPS = 1e-20
_PAPER = "StyleStudio, CVPR 2025, arXiv 2412.08503"


@dataclass(frozen=True, kw_only=True)
class StyleStudio(ImageDriven):
    """StyleStudio's cross-modal AdaIN: the text's output takes the statistics of the style's; the
    style's output itself is not added.

        t = Attn(Q, text),  s = Attn(Q, style)
        out = (1 - scale) t + scale ((t - mean t) / std t * std s + mean s)

    over the tokens, per channel, unbiased, in fp32. Of several references each takes its turn.

    Args:
        scale: how much of the text's output is replaced; 1 is the paper.
        adapter: what makes tokens and keys: the paper's is CSGO's style adapter.
        layers, steps, references, image_encoder: as `ImageDriven`. Next to `StyleStudioTeacher`
            leave the teacher's prompt out of the references' `prompts`: it has no style.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Lei et al., StyleStudio, CVPR 2025, arXiv 2412.08503, sec. 3.2.
    """

    scale: float = 1.0

    name: ClassVar[str] = "style_studio"
    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        modality="text, image",
        route="encoder",
        hosts="SDXL",
        needs="prompts, a style picture, the CSGO checkpoint, CLIP ViT-bigG/14",
        weights="none of its own; those of CSGO state no licence",
    )

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """The style's branches, and what becomes of the text's output under them."""
        apart = tuple(
            Branch((Segment(p.key, p.value, rows=p.rows),), weight=1.0) for p in call.prompts
        )

        def after(text: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
            for prompt, style in zip(call.prompts, outputs, strict=True):
                weight = of_seeing(prompt, weight_of(prompt, call.numbers["scale"], call), call)
                share = over_heads(weight)
                before, under = wide(text), _adain(text, style)
                text = torch.lerp(before, under, share.to(before.dtype)).to(text.dtype)
            return text

        return CrossParts(apart=apart, after=after if apart else None)


def _adain(text: Tensor, style: Tensor) -> Tensor:
    """The text's output under the style's statistics, centred before it is scaled."""
    (mean, std), (to_mean, to_std) = (token_stats(x, eps=_EPS) for x in (text, style))
    centred = wide(text) - mean[:, :, None]
    return centred * (to_std / std)[:, :, None] + to_mean[:, :, None]


@dataclass(frozen=True, kw_only=True)
class StyleStudioTeacher(Injection):
    """StyleStudio's teacher: where the images look is taken from a row without style, what they see
    is their own.

        out = softmax( sigma Q_teacher K_teacher^T ) V

    The teacher is the first prompt of the call: the same text and noise as the image, no style.

    Args:
        layers: all self-attention layers, as the paper.
        steps: the first 20 of 50.
        references: as `Injection`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Lei et al., StyleStudio, CVPR 2025, arXiv 2412.08503, sec. 3.4.
    """

    layers: Layers = "all"
    steps: Steps = (0.0, 0.4)

    name: ClassVar[str] = "style_studio_teacher"
    ROLES: ClassVar[tuple[str, ...]] = ("teacher",)
    facts: ClassVar[Facts] = Facts(
        paper=_PAPER + " (teacher model)",
        modality="text, image",
        route="attention",
        needs="prompts; goes with style_studio or any other style in cross-attention",
    )

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        self._check(call)
        rows = [-1 if mine else b for b, mine in enumerate(call.rows.is_reference())]
        segment = Segment(
            of_reference(call.key, call, 0),
            call.value,
            rows=torch.tensor(rows),
            key_bias=None if call.key_bias is None else of_reference(call.key_bias, call, 0),
        )
        query = of_reference(call.query, call, 0)
        return attend(call, [(share_of(call, 0), (segment,))], content_query=query, gamma=1.0)
