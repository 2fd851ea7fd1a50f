"""What the methods share that give images softmaxes of their own next to the text."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from styleattn.branch import Branch, Segment

from ._base import Layer, Number, Settings
from ._cross import CrossCall, CrossParts, ImagePrompt


class Images(Settings):
    """Base of frozen dataclasses with the fields `adapter`, `image_encoder`, `steps` and
    `references`; their `NUMBERS` are factors on all images."""

    adapter: Any
    image_encoder: Any

    def _check(self, *numbers: str) -> list[str]:
        """Put steps and references into their plain form; everything that is wrong with the
        fields."""
        reasons = [*self._wrong_numbers(*numbers), *self._plain_steps()]
        if not self._plain_references():
            reasons.append("references must all be Reference")
        if isinstance(self.adapter, type):
            reasons.append(f"adapter must be an adapter or a file, got {self.adapter.__name__}")
        return reasons

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data. Files and folders stay; objects (an adapter, an encoder,
        pictures, tensors) are no settings and become None: put them back after `from_dict`."""
        data = super().to_dict()
        for knob in ("adapter", "image_encoder", "text_encoder"):
            if knob in data:
                value = getattr(self, knob)
                is_path = isinstance(value, (str, os.PathLike))
                data[knob] = os.fspath(value) if is_path else None
        return data

    def takes_cross(self, layer: Layer) -> bool:
        """Every cross-attention layer."""
        return True

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """One branch per group of images that share a softmax; without an adapter of its own, the
        weight of the images of the pipeline's call."""
        scale: Number = 1.0
        for number in call.numbers.values():
            scale = scale * number
        if self.adapter is None:
            return CrossParts(loaded_weight=call.gate * scale)
        groups: dict[Any, list[ImagePrompt]] = {}
        for prompt in call.prompts:
            groups.setdefault(self._group(prompt), []).append(prompt)
        return CrossParts(branches=tuple(_branch(g, scale, call) for g in groups.values()))

    def _group(self, prompt: ImagePrompt) -> Any:
        reference = (self.references or ())[prompt.index]
        if reference.mask is not None:
            return prompt.index
        return reference.weight, str(reference.layers), tuple(reference.steps), reference.prompts


def _branch(group: list[ImagePrompt], scale: Number, call: CrossCall) -> Branch:
    segments = tuple(Segment(p.key, p.value, rows=p.rows) for p in group)
    weight = group[0].weight * scale
    mask = group[0].mask
    if isinstance(mask, Tensor):
        weight = (mask * weight).expand(call.query.shape[0], -1)
    return Branch(segments, weight=weight)
