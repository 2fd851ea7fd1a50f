"""OminiControl: clean pictures next to the image that look back at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ._facts import Facts
from ._joint import JointCall, Part, per_query
from ._shown import Place
from .in_context import InContext


@dataclass(frozen=True, kw_only=True)
class OminiControl(InContext):
    """OminiControl's conditions: the pictures' tokens run with the image at every step, at the
    noise level 0 and under a LoRA of their own, and see the image and the text.

        logit(i, j) += log s_XY    for a query i of X that sees a key j of Y

    The strengths are those of `InContext`; the authors' factor c is all four of them. Pictures do
    not see each other. What they are to a layer changes with the image: nothing can be kept
    (`EasyControl` with `guidance=1` is the form that keeps, OminiControl2's).

    Args:
        references: pictures: `image`, which the pipeline's VAE encodes in its own size, or in that
            of a megapixel where it is larger; or clean `latents` [C, h, w].
        offset: (down, right), in tokens, of the pictures from the image's first token: (0, 0) for
            pictures that lie on the image, (0, -32) for the authors' subjects of 512 pixels.
        lora: the name of a LoRA that was loaded for the pictures (`load_lora_weights(...,
            adapter_name=...)`). While the method is applied it is at work on their tokens alone.
        guidance: the guidance scale that is told for them; None for the call's.
        strength, text_strength, sees_image, sees_text, layers, steps: as in `InContext`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Tan et al., OminiControl, ICCV 2025, arXiv 2411.15098.
    """

    offset: tuple[float, float] = (0.0, 0.0)
    lora: str | None = None
    guidance: float | None = 1.0

    name: ClassVar[str] = "omini_control"
    facts: ClassVar[Facts] = Facts(
        paper="OminiControl, ICCV 2025, arXiv 2411.15098",
        modality="text, image",
        route="attention",
        hosts="FLUX.1",
        needs="prompts, a picture, a LoRA that was trained for pictures in context",
        weights="those of the LoRA",
    )

    def _wrong(self) -> list[str]:
        reasons = [*super()._wrong(), *self._own()]
        if self.positions == "diagonal":
            reasons.append("positions are InContext's; say the offset")
        return reasons

    @property
    def clean(self) -> bool:
        """At the noise level 0."""
        return True

    @property
    def idle(self) -> bool:
        """Whether the layers are left as the model has them: one picture at strength 1."""
        return super().idle and len(self.references or ()) < 2

    def places(self, image: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[Place]:
        """All pictures alike: they do not see each other."""
        return [(0, *self.offset) for _ in sizes]

    def _sees(self, call: JointCall, part: Part) -> Part:
        """Pictures see the image, the text and themselves."""
        part = super()._sees(call, part)
        spans = [p.span for p in call.pictures if p is not None and p.span is not None]
        for i, span in enumerate(spans):
            bias = per_query(0.0, part.query).clone()
            for other in spans:
                if other != span:
                    bias[:, other] = -torch.inf
            part = part.changed(f"reference {i}", logit_bias=bias)
        return part
