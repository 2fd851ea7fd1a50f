"""PuLID on SDXL: a face's tokens in a softmax of their own, kept out of the way of the text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from styleattn.branch import Branch, Segment
from styleattn.references import Reference

from ._cross import CrossCall, CrossParts, ImagePrompt
from ._driven import ImageDriven, of_seeing, over_heads, weight_of, wide
from ._facts import Facts

ORTHO = ("", "v1", "v2")


@dataclass(frozen=True, kw_only=True)
class PuLIDSDXL(ImageDriven):
    """PuLID's ID branch on SDXL: keys of zero next to the ID's, and no component along the text's
    output.

        h = Attn(Q, text),  o = Attn(Q, [id, num_zero zeros])
        out = h + id_scale * (o - (1 - m) P),  P = (sum_n h o / sum_n h h) h  per channel

    over the tokens n. m is 0 in "v1"; in "v2" it is the share, averaged over the heads, of a
    query's attention on the first five ID tokens, under logits without the softmax scale, as
    released; without `ortho` nothing is taken off. In fp32.

    Args:
        id_scale: of the branch; 0 is the model without it.
        num_zero: keys with logit 0 and value 0.
        ortho: "v2", "v1", or "" for none. The authors' "fidelity" is num_zero=8 with "v2", their
            "extremely style" num_zero=16 with "v1".
        adapter: what makes tokens and keys.
        identity: a file of `styleattn.adapters.save_identity`, for references without picture and
            embeds; without references it is the one.
        faces: what makes the inputs of PuLID of a picture [H, W, 3] (uint8): a
            `styleattn.adapters.faces.FaceAnalyser`. For references with a picture.
        layers, steps, references, image_encoder: as `ImageDriven`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Guo et al., PuLID, NeurIPS 2024, arXiv 2404.16022;
        ToTheBeginning/PuLID, pulid/attention_processor.py.
    """

    id_scale: float = 0.8
    num_zero: int = 8
    ortho: str = "v2"
    identity: Any = None
    faces: Any = None

    name: ClassVar[str] = "pulid_sdxl"
    NUMBERS: ClassVar[tuple[str, ...]] = ("id_scale",)
    facts: ClassVar[Facts] = Facts(
        paper="PuLID, NeurIPS 2024, arXiv 2404.16022",
        modality="text, image",
        route="encoder",
        hosts="SDXL",
        needs="prompts, a face picture, the PuLID checkpoint, EVA-CLIP and a face embedding",
        weights="guozinan/PuLID, Apache-2.0 as its code; InsightFace's embedding: research only",
    )

    def __post_init__(self) -> None:
        if self.identity is not None and self.references is None:
            object.__setattr__(self, "references", (Reference(),))
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data; an analyser is none and becomes None."""
        named = self.identity is not None
        return {
            **super().to_dict(),
            "identity": os.fspath(self.identity) if named else None,
            "faces": None,
        }

    def _reasons(self) -> list[str]:
        reasons = []
        if self.identity is not None and not isinstance(self.identity, (str, os.PathLike)):
            reasons.append(f"identity must be a file, got a {type(self.identity).__name__}")
        if self.faces is not None and not callable(self.faces):
            reasons.append(f"faces must be callable, got a {type(self.faces).__name__}")
        zeros = self.num_zero
        if isinstance(zeros, bool) or not isinstance(zeros, int) or zeros < 0:
            reasons.append(f"num_zero must be an int >= 0, got {zeros!r}")
        if self.ortho not in ORTHO:
            reasons.append(f"ortho must be one of {ORTHO}, got {self.ortho!r}")
        return reasons

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """A branch for each image, added as it is or without its component along the text's."""
        if not self.ortho:
            return CrossParts(branches=tuple(self._branch(p, call) for p in call.prompts))
        apart: list[Branch] = []
        for prompt in call.prompts:
            apart.append(self._plain(prompt))
            if self.ortho == "v2":
                apart.append(self._share(prompt, call))

        def after(text: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
            each = len(outputs) // len(call.prompts)
            h = total = wide(text)
            for i, prompt in enumerate(call.prompts):
                identity, *share = outputs[i * each : (i + 1) * each]
                added = _beside(h, wide(identity), share)
                weight = of_seeing(prompt, weight_of(prompt, call.numbers["id_scale"], call), call)
                total = total + over_heads(weight) * added
            return total.to(text.dtype)

        return CrossParts(apart=tuple(apart), after=after if apart else None)

    def _plain(self, prompt: ImagePrompt) -> Branch:
        segment = Segment(prompt.key, prompt.value, rows=prompt.rows, null_keys=self.num_zero)
        return Branch((segment,))

    def _branch(self, prompt: ImagePrompt, call: CrossCall) -> Branch:
        weight = weight_of(prompt, call.numbers["id_scale"], call)
        return Branch(self._plain(prompt).segments, weight=weight)

    def _share(self, prompt: ImagePrompt, call: CrossCall) -> Branch:
        """The branch whose output is, in every channel, the attention on the first five tokens."""
        first = torch.zeros_like(prompt.value)
        first[:, :, :5] = 1.0
        scale = call.query.shape[-1] ** 0.5  # undoes the softmax scale
        segment = Segment(
            prompt.key, first, rows=prompt.rows, logit_scale=scale, null_keys=self.num_zero
        )
        return Branch((segment,))


def _beside(text: Tensor, identity: Tensor, share: list[Tensor]) -> Tensor:
    """What of an output [B, H, N, D] is not along the text's; with shares, the less of it is taken
    off the larger they are."""
    along = (text * identity).sum(-2, keepdim=True)
    length = (text * text).sum(-2, keepdim=True)
    ratio = torch.where(length > 0, along / length, 0.0)
    if not share:
        return identity - ratio * text
    seen = wide(share[0][..., :1]).mean(1, keepdim=True)
    return identity - (1 - seen) * ratio * text
