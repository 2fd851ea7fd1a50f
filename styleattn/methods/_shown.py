"""What a method is to a host that takes pictures as tokens next to the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from styleattn.references import Reference

from ._base import Layer
from ._joint import JointMethod, JointSettings

Place = tuple[float, float, float]
"""What is added to the three positions of every token of a picture."""


@dataclass(frozen=True)
class Shown:
    """A picture at one layer: a part of the run "reference", or keys and values made before.

    Args:
        span: its tokens in the run.
        key, value: [1 or B, H, M, D], rotated.
    """

    span: slice | None = None
    key: Tensor | None = None
    value: Tensor | None = None


@runtime_checkable
class PictureMethod(JointMethod, Protocol):
    """A joint method whose references are pictures in the image's own tokens."""

    @property
    def apart(self) -> bool:
        """Whether the pictures run through the model on their own, at the noise level 0, and see
        themselves only: what they are to a layer is then the same at every step."""
        ...

    @property
    def clean(self) -> bool:
        """Whether pictures in the sequence are at the noise level 0, not at the image's."""
        ...

    @property
    def guidance(self) -> float | None:
        """The guidance scale that is told for them; None for the call's."""
        ...

    @property
    def lora(self) -> str | None:
        """The LoRA that is at work on them alone, where they run on their own or are clean."""
        ...

    @property
    def cache(self) -> bool:
        """Whether what they are to a layer is kept over the steps of a run."""
        ...

    @property
    def idle(self) -> bool:
        """Whether pictures in the sequence are seen as the model sees them."""
        ...

    def places(self, image: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[Place]:
        """Where the pictures stand, by the rows and columns of the image and of each of them."""
        ...


@dataclass(frozen=True, kw_only=True)
class PictureSettings(JointSettings):
    """Base of frozen dataclasses for pictures in context."""

    def _strengths(self, *names: str) -> list[str]:
        """What is wrong with strengths, and with the references."""
        found = self._check(*names)
        if not found:
            found = [
                f"{name} must not be negative, got {getattr(self, name)}"
                for name in names
                if getattr(self, name) < 0
            ]
        for i, r in enumerate(self.references or ()):
            if isinstance(r, Reference):
                found += _reasons_against(f"references[{i}]", r)
        return found

    def _own(self) -> list[str]:
        """What is wrong with the fields `offset`, `lora` and `guidance`; the offset in its plain
        form."""
        offset, lora, guidance = (getattr(self, knob) for knob in ("offset", "lora", "guidance"))
        reasons = [] if guidance is None else self._wrong_numbers("guidance")
        if not isinstance(offset, (list, tuple)) or len(offset) != 2:
            reasons.append(f"offset must be (down, right), got {offset!r}")
        else:
            object.__setattr__(self, "offset", tuple(float(x) for x in offset))
        if lora is not None and not isinstance(lora, str):
            reasons.append(f"lora must be the name of a LoRA, got {lora!r}")
        return reasons

    def takes(self, layer: Layer) -> bool:
        """Every chosen layer."""
        return True


def _reasons_against(name: str, reference: Reference) -> list[str]:
    """What is wrong with a picture."""
    reasons = []
    x: Any = reference.latents
    even = isinstance(x, Tensor) and x.ndim == 3 and not x.shape[1] % 2 and not x.shape[2] % 2
    if x is not None and not even:
        got = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        reasons.append(f"{name}.latents must be [C, h, w], h and w even, got {got}")
    if reference.embeds is not None or reference.prompts is not None:
        reasons.append(f"{name}: a picture in context has neither embeds nor prompts")
    return reasons
