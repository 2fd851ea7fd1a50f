"""What the methods have in common whose images have roles, or act on more than their own branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from styleattn.references import Layers, Reference, Steps

from ._base import Layer, Number
from ._blocks import BlockCall
from ._cross import CrossCall, ImagePrompt
from ._images import Images


@dataclass(frozen=True, kw_only=True)
class ImageDriven(Images):
    """Base of methods that show images to cross-attention.

    Args:
        adapter: what makes tokens and keys (`styleattn.adapters`), or its file. Where images have
            roles, it has an adapter for each role as an attribute of that name.
        layers: which cross-attention layers: "all", "style", "layout", patterns, or diffusers'
            scale dictionary.
        steps: when: (start, end) fractions of the run, or a curve of weights.
        references: the images, each with its weight, mask, layers, steps and prompts.
        image_encoder: what encodes the references' pictures, or its folder; None for the
            pipeline's.
    """

    adapter: Any = None
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)
    references: tuple[Reference, ...] | None = None
    image_encoder: Any = None

    NUMBERS: ClassVar[tuple[str, ...]] = ("scale",)
    MASKS: ClassVar[bool] = True
    """Whether a reference may have a mask."""
    ROLES: ClassVar[tuple[str, ...]] = ()
    """What its references are, in order; fewer references are the last ones. () for any number."""

    def __post_init__(self) -> None:
        reasons = [*self._check(*self.NUMBERS), *self._reasons()]
        if isinstance(self.references, tuple) and not reasons:
            reasons = self._of_references(self.references)
        self._refuse(reasons)

    def _reasons(self) -> list[str]:
        """What is wrong with the method's own knobs."""
        return []

    def _of_references(self, references: tuple[Reference, ...]) -> list[str]:
        """What is wrong with the references."""
        reasons = []
        if not self.MASKS and any(r.mask is not None for r in references):
            reasons.append("its images act on the text's attention, which knows no masks")
        if self.roles and not 0 < len(references) <= len(self.roles):
            reasons.append(
                f"references must be {' and '.join(self.roles)}, got {len(references)} of them"
            )
        return reasons

    @property
    def roles(self) -> tuple[str, ...]:
        """What the references are, in order."""
        return self.ROLES[-len(self.references or self.ROLES) :]

    def takes_cross(self, layer: Layer) -> bool:
        """Every layer that an image reaches."""
        return any(self.reaches(layer, i) for i in range(len(self.references or ())))

    def adapter_of(self, index: int, component: str = "unet") -> Any:
        """The adapter of a reference in a component of the pipeline; None where it has none."""
        if component != "unet":
            return None
        return getattr(self.adapter, self.roles[index], None) if self.roles else self.adapter

    def reaches(self, layer: Layer, index: int, component: str = "unet") -> bool:
        """Whether a reference acts at a layer: its adapter has projections for it. One that does
        not list its layers (`names`) has them for all."""
        adapter = self.adapter_of(index, component)
        names = getattr(adapter, "names", None)
        return adapter is not None and (names is None or layer.name in names)


def weight_of(prompt: ImagePrompt, scale: Number, call: CrossCall | BlockCall) -> Number:
    """The weight of an image's own branch: a number, or [B, N] with a mask."""
    weight = prompt.weight * scale
    if prompt.mask is None:
        return weight
    spread: Tensor = (prompt.mask * weight).expand(call.query.shape[0], -1)
    return spread


def of_seeing(prompt: ImagePrompt, weight: Number, call: CrossCall) -> Tensor:
    """[B] or [B, N]: a weight for the rows that see the image, 0 for the others."""
    sees = (prompt.rows.to(call.query.device) >= 0).float()
    if isinstance(weight, Tensor) and weight.ndim == 2:
        sees = sees[:, None]
    return sees * weight


def over_heads(weight: Tensor) -> Tensor:
    """[B] or [B, N] against [B, H, N, D]."""
    return weight[:, None, None, None] if weight.ndim == 1 else weight[:, None, :, None]


def wide(x: Tensor) -> Tensor:
    """x in the precision of statistics: fp32, or fp64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()
