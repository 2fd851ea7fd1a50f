"""IP-Adapter: images as prompts, in a softmax of their own next to the text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from styleattn.branch import Branch, Segment
from styleattn.references import Layers, Reference, Steps, check_steps

from ._base import Layer, Number, Settings
from ._cross import CrossCall, CrossParts, ImagePrompt


@dataclass(frozen=True)
class IPAdapter(Settings):
    """IP-Adapter: Text Compatible Image Prompt Adapter.

        out = Attn(Q, K_text, V_text) + scale · Σ_i w_i · Attn(Q, W_k T_i, W_v T_i)

    Images that share weight, layers, steps and prompts and have no mask share one softmax, as their
    tokens side by side do; an image with a mask, or with a weight of its own, has its own.

    Args:
        scale: of all images; 0 is the model without them.
        adapter: what makes tokens and keys (`styleattn.adapters`). None: the adapters that
            diffusers' `load_ip_adapter` has put into the pipeline, with the images of the
            pipeline's call and the scales of `set_ip_adapter_scale`; then `scale` must stay 1.
        layers: which cross-attention layers: "all", "style", "layout", patterns, or diffusers'
            scale dictionary.
        steps: when: (start, end) fractions of the run, or a curve of weights.
        references: the images, each with its weight, mask, layers, steps and prompts.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Ye et al., IP-Adapter, arXiv 2308.06721.
    """

    scale: float = 1.0
    adapter: Any = None
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)
    references: tuple[Reference, ...] | None = None

    name: ClassVar[str] = "ip_adapter"
    NUMBERS: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        reasons = []
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            reasons.append(f"scale must be a number, got {self.scale!r}")
        elif not math.isfinite(self.scale):
            reasons.append(f"scale must be finite, got {self.scale}")
        elif self.adapter is None and self.scale != 1.0:
            reasons.append("scale of loaded adapters is set with pipe.set_ip_adapter_scale")
        try:
            object.__setattr__(self, "steps", check_steps("steps", self.steps))
        except ValueError as error:
            reasons.append(str(error))
        references: Any = self.references
        if isinstance(references, (list, Reference)):
            references = (references,) if isinstance(references, Reference) else tuple(references)
            object.__setattr__(self, "references", references)
        if references is not None and not all(isinstance(r, Reference) for r in references):
            reasons.append("references must all be Reference")
        if reasons:
            raise ValueError("IPAdapter: " + "; ".join(reasons))

    def takes_cross(self, layer: Layer) -> bool:
        """Every cross-attention layer."""
        return True

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """One branch per group of images that share a softmax."""
        groups: dict[Any, list[ImagePrompt]] = {}
        for prompt in call.prompts:
            groups.setdefault(self._group(prompt), []).append(prompt)
        scale = call.numbers["scale"]
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
    if mask is not None:
        weight = (mask * weight).expand(call.query.shape[0], -1)
    return Branch(segments, weight=weight)
