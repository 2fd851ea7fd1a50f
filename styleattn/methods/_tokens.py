"""What the methods have in common whose pictures are tokens next to the text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from styleattn.references import Layers, Reference, Steps

from ._base import Layer, Number, log
from ._joint import JointCall, JointSettings, Parts, seen_by


@dataclass(frozen=True, kw_only=True)
class TokenSettings(JointSettings):
    """Base of frozen dataclasses with pictures next to the text, each a segment under a strength of
    its own."""

    adapter: Any = None
    image_encoder: Any = None
    strength: float = 1.0
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)

    @property
    def embedded(self) -> bool:
        """Whether the tokens have the model's own width: they enter behind its text embedder."""
        return False

    def _strengths(self, *more: str) -> list[str]:
        """What is wrong with the numbers, the steps and the references."""
        reasons = self._check("strength", *more)
        if not reasons and self.strength < 0:
            reasons.append(f"strength must not be negative, got {self.strength}")
        for i, r in enumerate(self.references or () if not reasons else ()):
            reasons += self._against(i, r)
        return reasons

    def _against(self, index: int, reference: Reference) -> list[str]:
        """What is wrong with a reference."""
        x: Any = reference.embeds
        if x is None and reference.image is not None:
            lacking = f"references[{index}].image needs an adapter that makes its tokens"
            return [] if self.adapter is not None else [lacking]
        shapes = self._shapes()
        known = isinstance(x, Tensor) and x.is_floating_point()
        if not known or x.ndim not in [len(s) for s in shapes]:
            got = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            said = " or ".join(f"[{', '.join(s)}]" for s in shapes)
            return [f"references[{index}].embeds must be {said}, got {got}"]
        return []

    def _shapes(self) -> tuple[str, ...]:
        """The shapes that embeddings of one picture, and of one per prompt, may have."""
        return ("MC", "PMC")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data. Files and folders stay; objects (an adapter, an encoder,
        pictures, tensors) are no settings and become None: put them back after `from_dict`."""
        data = super().to_dict()
        for knob in ("adapter", "image_encoder"):
            value = getattr(self, knob)
            data[knob] = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        return data

    def takes(self, layer: Layer) -> bool:
        """Every chosen layer."""
        return True

    def context(self, embeds: Tensor) -> Tensor:
        """The tokens [P, M, C] of a picture."""
        return embeds[None] if embeds.ndim == 2 else embeds

    def weighed(self, tokens: Tensor, strength: Number) -> Tensor:
        """The tokens as they enter the model."""
        return tokens

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the pictures at their strengths."""
        changed = dict(parts)
        for r, run in enumerate(call.runs):
            if run is None:
                continue
            for name, part in changed.items():
                rows = None if name == run else call.serves[r]
                bias = self._bias(call, r, name)
                changed[name] = part.changed(run, logit_bias=bias, rows=rows)
        return changed

    def _bias(self, call: JointCall, reference: int, part: str) -> Number:
        """On the logits of a picture's tokens, for the queries of a run."""
        if part == call.runs[reference]:
            return 0.0
        return seen_by(call, reference, part) + log(call.numbers["strength"])
