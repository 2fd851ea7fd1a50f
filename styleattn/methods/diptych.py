"""FLUX.1 Fill on a canvas of two panels: how strongly they, and Redux' tokens, see each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from styleattn.branch import Segment
from styleattn.references import Layers, Steps

from ._base import Layer, Number, log
from ._facts import Facts
from ._joint import JointCall, JointSettings, Part, Parts, per_query

ARRANGEMENTS = ("side_by_side", "stacked")
A, B = "image A", "image B"


@dataclass(frozen=True, kw_only=True)
class FillDiptych(JointSettings):
    """FLUX.1 Fill on a canvas [A | B]: panel A is the reference, panel B is painted.

        logit(i, j) += log s_XY    for a query i of X that sees a key j of Y

    X and Y are the tokens of panel A, of panel B, and of Redux' pictures (or of any other method
    that puts tokens next to the text). A strength of 1 is the model as it is, with all of them at 1
    bit for bit; 0 takes the keys away, so that `a_to_b=0` keeps A from changing with B. The biases
    belong to segments: no mask of all tokens by all tokens is made, and to this end the tokens of a
    panel lie together within the model. `styleattn.pipelines.fill_diptych` builds the canvas, calls
    the pipeline and crops panel B.

    Args:
        a_to_b, b_to_a: s_AB and s_BA, of the panels; `b_to_a` above 1 is more of the reference.
        a_to_redux, b_to_redux: s_AR and s_BR: what the panels see of Redux' tokens, times the
            strength that Redux gives them.
        redux_to_a, redux_to_b: s_RA and s_RB: what Redux' tokens see of the panels.
        arrangement: "side_by_side" has A on the left, "stacked" on top.
        split: where A ends, as a fraction of the canvas' width or height; the nearest token counts.
        layers: which layers.
        steps: when: (start, end) fractions of the run, or a curve of weights w: log s times w.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Black Forest Labs, FLUX.1 Fill [dev] and Redux [dev]; the canvas of two panels: Huang et
        al., In-Context LoRA for Diffusion Transformers, arXiv 2410.23775; Song et al., Insert
        Anything, arXiv 2504.15009.
    """

    a_to_b: float = 1.0
    b_to_a: float = 1.0
    a_to_redux: float = 1.0
    b_to_redux: float = 1.0
    redux_to_a: float = 1.0
    redux_to_b: float = 1.0
    arrangement: str = "side_by_side"
    split: float = 0.5
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)

    name: ClassVar[str] = "fill_diptych"
    NUMBERS: ClassVar[tuple[str, ...]] = (
        "a_to_b",
        "b_to_a",
        "a_to_redux",
        "b_to_redux",
        "redux_to_a",
        "redux_to_b",
    )
    facts: ClassVar[Facts] = Facts(
        paper="FLUX.1 Fill [dev] and Redux [dev], Black Forest Labs; In-Context LoRA, 2410.23775",
        modality="text, image",
        route="attention",
        hosts="FLUX.1 Fill",
        needs="a canvas of the reference and of what is painted; Redux beside it where wanted",
        weights="black-forest-labs/FLUX.1-Fill-dev, non-commercial",
    )

    def __post_init__(self) -> None:
        reasons = self._check(*self.NUMBERS, "split")
        if not reasons:
            strengths = {n: getattr(self, n) for n in self.NUMBERS}
            reasons += [f"{n} must not be negative, got {s}" for n, s in strengths.items() if s < 0]
            if not 0 < self.split < 1:
                reasons.append(f"split must lie between 0 and 1, got {self.split}")
        if self.arrangement not in ARRANGEMENTS:
            reasons.append(f"arrangement must be one of {ARRANGEMENTS}, got {self.arrangement!r}")
        if self.references is not None:
            reasons.append("references have no place here: panel A of the canvas is the reference")
        self._refuse(reasons)

    @property
    def idle(self) -> bool:
        """Whether it leaves the model as it is."""
        return all(getattr(self, name) == 1.0 for name in self.NUMBERS)

    def takes(self, layer: Layer) -> bool:
        """Every chosen layer."""
        return True

    def in_second(self, places: Tensor) -> Tensor:
        """[N] bool: whether the image tokens at rows and columns [N, 2] belong to panel B.

        Raises:
            ValueError: a canvas so small, or a split so far out, that a panel has no tokens.
        """
        along = places[:, int(self.arrangement == "side_by_side")]
        size = int(along.amax()) + 1
        cells = round(self.split * size)
        if not 0 < cells < size:
            raise ValueError(
                f"{self.name}: split {self.split} of {size} tokens leaves a panel without any"
            )
        return along >= cells

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the image's tokens as two segments, and the biases."""
        first = call.panels
        if first is None:
            raise ValueError(f"{self.name}: the tokens of the panels do not lie together")
        s = {n: log(call.numbers[n]) * call.gate for n in self.NUMBERS}
        names = list(call.tokens)
        beside = [n for n in names[: names.index("image")] if n != "text"]
        halves: dict[tuple[int, ...], tuple[Segment, Segment]] = {}
        return {n: self._parted(n, part, s, beside, first, halves) for n, part in parts.items()}

    def _parted(
        self,
        name: str,
        part: Part,
        s: Mapping[str, Number],
        beside: Sequence[str],
        first: int,
        halves: dict[tuple[int, ...], tuple[Segment, Segment]],
    ) -> Part:
        """What the queries of a run see, with the panels apart; the rest of the part likewise."""
        rest = part.rest
        if rest is not None:
            rest = self._parted(name, rest, s, beside, first, halves)
        segments: dict[str, Segment] = {}
        for run, segment in part.segments.items():
            if run == "image":
                segments[A], segments[B] = _halves(segment, first, halves)
            else:
                segments[run] = segment
        part = replace(part, segments=segments, rest=None)
        if name == "image":
            part = _biased(part, A, 0.0, s["b_to_a"], first)
            part = _biased(part, B, s["a_to_b"], 0.0, first)
            for run in beside:
                part = _biased(part, run, s["a_to_redux"], s["b_to_redux"], first)
        elif name in beside:
            part = _biased(part, A, s["redux_to_a"], s["redux_to_a"], first)
            part = _biased(part, B, s["redux_to_b"], s["redux_to_b"], first)
        return replace(part, rest=rest)


def _halves(
    segment: Segment, first: int, known: dict[tuple[int, ...], tuple[Segment, Segment]]
) -> tuple[Segment, Segment]:
    """The first keys of a segment and the others; the same views for segments of the same keys."""
    key, value, bias = segment.key, segment.value, segment.key_bias
    name = (id(key), id(value), id(bias))
    if name not in known:
        made: list[Segment] = []
        for here in (slice(first), slice(first, None)):
            mine = None if bias is None else bias[..., here]
            made.append(Segment(key[:, :, here], value[:, :, here], key_bias=mine))
        known[name] = (made[0], made[1])
    parts = [
        replace(segment, key=half.key, value=half.value, key_bias=half.key_bias)
        for half in known[name]
    ]
    return parts[0], parts[1]


def _biased(part: Part, run: str, a: Number, b: Number, first: int) -> Part:
    """More bias on a segment: a for the first queries, b for the others."""
    more: Any = a
    if a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
        length = part.query.shape[2]
        device = part.query.device
        sizes = ((a, first), (b, length - first))
        wide = [torch.as_tensor(x, dtype=torch.float32, device=device).expand(n) for x, n in sizes]
        more = torch.cat(wide)[None]
    elif not isinstance(a, Tensor) and a == 0.0:
        return part
    there = part.segments[run].logit_bias
    if (isinstance(there, Tensor) and there.ndim) or (isinstance(more, Tensor) and more.ndim):
        more = per_query(there, part.query) + per_query(more, part.query)
    else:
        more = there + more
    return part.changed(run, logit_bias=more)
