"""Pictures in context: tokens next to the image's, under strengths and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from styleattn.branch import Segment
from styleattn.references import Layers, Steps

from ._base import Number, log
from ._facts import Facts
from ._joint import JointCall, Part, Parts, per_query, seen_by
from ._shown import PictureSettings, Place, Shown

POSITIONS = ("index", "diagonal")
_SEES = ("strength", "text_strength", "sees_image", "sees_text")


@dataclass(frozen=True, kw_only=True)
class InContext(PictureSettings):
    """Pictures in context, as in FLUX.1 Kontext, UNO, USO and OmniStyle: their clean latents are
    further tokens of the sequence, at the model's noise level.

        logit(i, j) += log s_XY    for a query i of X that sees a key j of Y

    X and Y are the image, the text and each picture. A strength of 1 is the model as it is, 0 takes
    the keys away. The strengths of a picture are times its weight, and its mask says where in the
    image it is seen (text sees the mask's mean). Clean pictures are `OminiControl`, USO's style
    pictures are `USO`. No mask of all tokens by all tokens is made.

    Args:
        references: pictures: `image`, which the pipeline's VAE encodes in its own size, or in that
            of a megapixel where it is larger; or clean `latents` [C, h, w]. None: the picture of
            the pipeline's call (`FluxKontextPipeline`); one reference without a picture gives that
            one weight, mask, layers and steps.
        strength: what the image sees of the pictures.
        text_strength: what the text sees of them.
        sees_image, sees_text: what the pictures see of the image and of the text.
        positions: where pictures of one's own stand. "index": on the image's rows and columns, the
            first position counting the pictures, as in Kontext. "diagonal": below and to the right
            of the image, and of the picture before, as in UNO, USO and OmniStyle.
        layers: which layers see the pictures.
        steps: when: (start, end) fractions of the run, or a curve of weights.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Black Forest Labs, FLUX.1 Kontext, arXiv 2506.15742; Wu et al., UNO, arXiv 2504.02160;
        Wu et al., USO, arXiv 2508.18966; Wang et al., OmniStyle, arXiv 2505.14028; Tan et al.,
        OminiControl, arXiv 2411.15098.
    """

    strength: float = 1.0
    text_strength: float = 1.0
    sees_image: float = 1.0
    sees_text: float = 1.0
    positions: str = "index"
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)

    name: ClassVar[str] = "in_context"
    NUMBERS: ClassVar[tuple[str, ...]] = _SEES
    facts: ClassVar[Facts] = Facts(
        paper="FLUX.1 Kontext, arXiv 2506.15742; UNO, USO, OmniStyle, OminiControl",
        modality="text, image",
        route="attention",
        hosts="FLUX.1",
        needs="prompts, a picture, a model or LoRA that was trained with pictures in context",
        weights="those of the model or LoRA: FLUX.1 Kontext [dev] is non-commercial",
    )

    def __post_init__(self) -> None:
        self._refuse(self._wrong())

    def _wrong(self) -> list[str]:
        """What is wrong with the settings."""
        reasons = self._strengths(*_SEES)
        if self.positions not in POSITIONS:
            reasons.append(f"positions must be one of {POSITIONS}, got {self.positions!r}")
        return reasons

    @property
    def apart(self) -> bool:
        """They run with the image."""
        return False

    @property
    def clean(self) -> bool:
        """They are at the image's noise level."""
        return False

    @property
    def guidance(self) -> float | None:
        """They are told what the image is told."""
        return None

    @property
    def lora(self) -> str | None:
        """What is at work on them is at work on the image."""
        return None

    @property
    def cache(self) -> bool:
        """They change with the image."""
        return False

    @property
    def idle(self) -> bool:
        """Whether the model is left as it is."""
        return all(getattr(self, name) == 1.0 for name in _SEES)

    def places(self, image: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[Place]:
        """Where the pictures stand."""
        found: list[Place] = []
        down, right = image
        for index, (rows, columns) in enumerate(sizes, 1):
            found.append((index, 0, 0) if self.positions == "index" else (0, down, right))
            down, right = down + rows, right + columns
        return found

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the pictures' keys apart from each other, at their
        strengths."""
        changed = {}
        for name, part in parts.items():
            changed[name] = self._seen(call, self._apart(call, part), name)
        changed["reference"] = self._sees(call, changed["reference"])
        return changed

    def _apart(self, call: JointCall, part: Part) -> Part:
        """The same with the keys of each picture in a segment of their own."""
        whole = part.segments["reference"]
        others = {n: s for n, s in part.segments.items() if n != "reference"}
        spans = [p.span for p in call.pictures if p is not None and p.span is not None]
        first = min(s.start for s in spans)
        mine = {f"reference {i}": _cut(whole, s) for i, s in enumerate(spans)}
        if first:
            mine = {"reference": _cut(whole, slice(0, first)), **mine}
        rest = None if part.rest is None else self._apart(call, part.rest)
        return replace(part, segments={**others, **mine}, rest=rest)

    def _seen(self, call: JointCall, part: Part, name: str) -> Part:
        """What the queries of a run see of the pictures; pictures see each other as they are."""
        if name == "reference":
            return part
        factor = log(call.numbers["strength" if name == "image" else "text_strength"])
        for i, r in enumerate(_present(call.pictures)):
            bias = seen_by(call, r, name) + factor
            part = part.changed(f"reference {i}", logit_bias=bias)
        return part

    def _sees(self, call: JointCall, part: Part) -> Part:
        """What the queries of the pictures see of the other runs; other pictures in context, which
        stand before them, see all."""
        spans = [p.span for p in call.pictures if p is not None and p.span is not None]
        first = min(s.start for s in spans)
        for name in part.segments:
            if name.startswith("reference"):
                continue
            bias: Number = log(call.numbers["sees_image" if name == "image" else "sees_text"])
            if first:
                wide = per_query(bias, part.query).clone()
                wide[:, :first] = 0.0
                bias = wide
            part = part.changed(name, logit_bias=bias)
        return part


def _present(pictures: Sequence[Shown | None]) -> list[int]:
    """The references that are in the sequence."""
    return [r for r, p in enumerate(pictures) if p is not None and p.span is not None]


def _cut(segment: Segment, span: slice) -> Segment:
    """Some keys of a segment."""
    bias = None if segment.key_bias is None else segment.key_bias[..., span]
    key, value = segment.key[:, :, span], segment.value[:, :, span]
    return replace(segment, key=key, value=value, key_bias=bias)
