"""Pictures in context that run on their own: made once, seen at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from styleattn.branch import Segment
from styleattn.references import Layers, Steps

from ._base import log
from ._facts import Facts
from ._joint import JointCall, Parts, seen_by
from ._shown import PictureSettings, Place


@dataclass(frozen=True, kw_only=True)
class EasyControl(PictureSettings):
    """EasyControl's condition branch: a picture's tokens run through the model by themselves, at
    the noise level 0, and see only themselves; the image and the text see them.

        out = softmax( [ Q K_textᵀ , Q K_imageᵀ , Q K_cᵀ + log s ] ) [ V_text ; V_image ; V_c ]

    What the picture is to a layer does not depend on the image or on the step. It is made at the
    first step of a run and kept for the others, exactly. OminiControl2's conditions are the same
    with another `offset` and `guidance=1`; those that look back at the image are `OminiControl`.

    Args:
        references: pictures: `image`, which the pipeline's VAE encodes in its own size, or in that
            of a megapixel where it is larger; or clean `latents` [C, h, w]. Their weights, masks
            (of the image's tokens; text sees the mask's mean), layers and steps hold.
        strength: s, of all pictures; 0 is the model without them.
        offset: (down, right), in tokens, of the pictures from the image's first token: (64, 0) is
            EasyControl's for subjects, (0, 0) goes with pictures that lie on the image.
        lora: the name of a LoRA that was loaded for the pictures (`load_lora_weights(...,
            adapter_name=...)`). While the method is applied it is at work on them alone.
        guidance: the guidance scale that is told for the pictures; None for the call's.
        cache: whether what they are to a layer is kept over the steps.
        layers: which layers see the pictures.
        steps: when: (start, end) fractions of the run, or a curve of weights.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Zhang et al., EasyControl, ICCV 2025, arXiv 2503.07027; Tan et al., OminiControl2,
        arXiv 2503.08280.
    """

    strength: float = 1.0
    offset: tuple[float, float] = (64.0, 0.0)
    lora: str | None = None
    guidance: float | None = None
    cache: bool = True
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)

    name: ClassVar[str] = "easy_control"
    NUMBERS: ClassVar[tuple[str, ...]] = ("strength",)
    facts: ClassVar[Facts] = Facts(
        paper="EasyControl, ICCV 2025, arXiv 2503.07027",
        modality="text, image",
        route="attention",
        hosts="FLUX.1",
        needs="prompts, a picture, a LoRA that was trained for pictures in context",
        weights="those of the LoRA",
    )

    def __post_init__(self) -> None:
        reasons = [*self._strengths("strength"), *self._own()]
        cache: Any = self.cache
        if not isinstance(cache, bool):
            reasons.append(f"cache must be True or False, got {cache!r}")
        self._refuse(reasons)

    @property
    def apart(self) -> bool:
        """They run on their own."""
        return True

    @property
    def clean(self) -> bool:
        """Not in the sequence."""
        return False

    @property
    def idle(self) -> bool:
        """Never, while a picture is there."""
        return False

    def places(self, image: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[Place]:
        """All pictures alike: they do not see each other."""
        return [(0, *self.offset) for _ in sizes]

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the pictures' keys and values in it."""
        changed = dict(parts)
        factor = log(call.numbers["strength"])
        for r, picture in enumerate(call.pictures):
            if picture is None or picture.key is None or picture.value is None:
                continue
            for name, part in changed.items():
                if name == "reference":
                    continue
                bias = seen_by(call, r, name) + factor
                segment = Segment(picture.key, picture.value, logit_bias=bias)
                changed[name] = part.with_segments({f"{self.name} {r}": segment})
        return changed
