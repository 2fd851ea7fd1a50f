"""DEADiff: image tokens in the text's own softmax, style and content at layers of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from styleattn.branch import Segment
from styleattn.references import Reference

from ._base import Layer
from ._cross import CrossCall, CrossParts, ImagePrompt
from ._driven import ImageDriven
from ._facts import Facts

SUBJECTS = ("style", "content")
CONTENT_LAYERS = (
    "down_blocks.2.",
    "mid_block.",
    "up_blocks.1.attentions.0.",
    "up_blocks.1.attentions.1.",
)
"""Where the content acts in SD 1.x; the style acts at all other layers."""


@dataclass(frozen=True, kw_only=True)
class DEADiff(ImageDriven):
    """DEADiff: text and image tokens under one softmax.

        out = softmax( sigma Q [K_text, w K_image]^T ) [V_text, w V_image]

    Rows without an image, and layers of the other subject, see tokens of zero instead: keys with
    logit 0 and value 0, which dilute the text. So w = 0 is not the model without DEADiff.

    Args:
        img_weight: w, on keys and values; the paper's 1.
        subject: what each reference shows, "style" or "content"; style alone, content alone, or
            both.
        queries: tokens of an image, and with it the number of the zero tokens.
        adapter: has `style` and `content`, as `load_deadiff` returns them, or its file; only those
            that `subject` names are needed. The checkpoint has a UNet of its own: load
            `load_deadiff(...).unet` into the pipeline's.
        layers, steps, references: as `ImageDriven`; one reference for each subject, without masks.
            Outside of `layers` and `steps` the model is as it was, without zero tokens.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Qi et al., DEADiff, CVPR 2024, arXiv 2403.06951, sec. 3.2-3.3;
        bytedance/DEADiff, ldm/modules/new_attention.py.
    """

    img_weight: float = 1.0
    subject: tuple[str, ...] = ("style",)
    queries: int = 16

    name: ClassVar[str] = "deadiff"
    NUMBERS: ClassVar[tuple[str, ...]] = ("img_weight",)
    MASKS: ClassVar[bool] = False
    facts: ClassVar[Facts] = Facts(
        paper="DEADiff, CVPR 2024, arXiv 2403.06951",
        modality="text, image",
        route="encoder",
        hosts="SD 1.x",
        needs="prompts, a style or content picture, the DEADiff checkpoint, CLIP ViT-L/14",
        weights="bytedance/DEADiff, Apache-2.0 as its code",
    )

    def _reasons(self) -> list[str]:
        reasons = []
        given: Any = self.subject
        if isinstance(given, (str, list)):
            given = (given,) if isinstance(given, str) else tuple(given)
            object.__setattr__(self, "subject", given)
        known = isinstance(self.subject, tuple) and all(s in SUBJECTS for s in self.subject)
        if not known or len(set(self.subject)) != len(self.subject) or not self.subject:
            reasons.append(f"subject must be style, content, or both, got {self.subject!r}")
        if isinstance(self.queries, bool) or not isinstance(self.queries, int) or self.queries < 1:
            reasons.append(f"queries must be a positive int, got {self.queries!r}")
        return reasons

    @property
    def roles(self) -> tuple[str, ...]:
        """What the references are, in order."""
        return self.subject

    def _of_references(self, references: tuple[Reference, ...]) -> list[str]:
        reasons = super()._of_references(references)
        if len(references) != len(self.subject):
            named = " and ".join(self.subject)
            reasons = [f"subject names {named}, there are {len(references)} references"]
        return reasons

    def takes_cross(self, layer: Layer) -> bool:
        """Every chosen layer: those of the other subject get zero tokens."""
        return True

    def reaches(self, layer: Layer, index: int, component: str = "unet") -> bool:
        """Whether the layer is one of the reference's subject."""
        of = "content" if layer.name.startswith(CONTENT_LAYERS) else "style"
        return self.subject[index] == of and super().reaches(layer, index, component)

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """Image tokens, or zero tokens, next to the text's."""
        if call.prompts:
            return CrossParts(segments=(self._segment(call.prompts[0], call),))
        empty = call.key[:1, :, :0]
        return CrossParts(segments=(Segment(empty, empty, null_keys=self.queries),))

    def _segment(self, prompt: ImagePrompt, call: CrossCall) -> Segment:
        found = prompt.key.shape[2]
        if found != self.queries:
            raise ValueError(
                f"DEADiff: {call.layer.name} got {found} image tokens, queries says {self.queries}"
            )
        weight = call.numbers["img_weight"] * prompt.weight
        nothing = torch.zeros_like(prompt.key[:1])
        return Segment(
            torch.cat([nothing, prompt.key[1:]]),
            torch.cat([nothing, prompt.value[1:] * weight]),
            rows=prompt.rows.clamp(min=0),
            logit_scale=weight,
        )
