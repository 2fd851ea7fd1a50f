"""PuLID on FLUX: a face's tokens, read by the image tokens between blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from styleattn.branch import Branch, Segment
from styleattn.references import Layers, Reference, Steps

from ._blocks import BlockCall
from ._driven import weight_of
from ._facts import Facts
from ._joint import JointSettings


@dataclass(frozen=True, kw_only=True)
class PuLIDFLUX(JointSettings):
    """PuLID on FLUX.1: behind every second double block and every fourth single block

        image = image + id_weight * sum_r w_r W_o Attn(Q(image), K(id_r), V(id_r))

    for the image tokens alone; each identity has a softmax of its own. In the unconditional call of
    true guidance the tokens of nobody stand for all of them, which are not zero.

    Order behind a block: the block itself with its attention and IP-Adapters, then this, then a
    ControlNet's residual. On Fill's canvas give the reference a mask, or the given half changes
    too; pictures in context are never changed.

    Args:
        id_weight: of all identities; 0 is the model without them.
        adapter: `styleattn.adapters.load_pulid`, or its file (pulid_flux_v0.9.0, v0.9.1).
        identity: a file of `styleattn.adapters.save_identity`, for references without picture and
            embeds; one reference may then be left out.
        faces: what makes the inputs of PuLID of a picture [H, W, 3] (uint8): a
            `styleattn.adapters.faces.FaceAnalyser`. Only for references with a picture.
        layers: behind which of the adapter's blocks, by their names.
        steps: when: (start, end) fractions of the run, or a curve of weights. The authors' start
            step 4 of 20 is (0.2, 1.0).
        references: the identities: `embeds`, the tokens of `PuLID.tokens`, [M, C] or one per prompt
            [P, M, C]; or `image`. `negative`: other tokens for the unconditional call. Their
            weights, masks, layers, steps and prompts hold.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Guo et al., PuLID, NeurIPS 2024, arXiv 2404.16022; ToTheBeginning/PuLID, the FLUX
        release.
    """

    id_weight: float = 1.0
    adapter: Any = None
    identity: Any = None
    faces: Any = None
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)

    name: ClassVar[str] = "pulid_flux"
    NUMBERS: ClassVar[tuple[str, ...]] = ("id_weight",)
    facts: ClassVar[Facts] = Facts(
        paper="PuLID, NeurIPS 2024, arXiv 2404.16022",
        modality="text, image",
        route="encoder",
        hosts="FLUX.1",
        needs="prompts, a face picture or its identity tokens, the PuLID-FLUX checkpoint",
        weights="guozinan/PuLID, Apache-2.0 as its code; InsightFace's embedding: research only",
    )

    def __post_init__(self) -> None:
        reasons = self._check("id_weight")
        if isinstance(self.adapter, type):
            reasons.append(f"adapter must be an adapter or a file, got {self.adapter.__name__}")
        if self.identity is not None and not isinstance(self.identity, (str, os.PathLike)):
            reasons.append(f"identity must be a file, got a {type(self.identity).__name__}")
        if self.faces is not None and not callable(self.faces):
            reasons.append(f"faces must be callable, got a {type(self.faces).__name__}")
        for i, r in enumerate(self.references or ()):
            if isinstance(r, Reference):
                reasons += _reasons_against(f"references[{i}]", r)
        self._refuse(reasons)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data. Files stay; objects (an adapter, an analyser, pictures,
        tensors) are no settings and become None: put them back after `from_dict`."""
        data = super().to_dict()
        for knob in ("adapter", "identity", "faces"):
            value = getattr(self, knob)
            data[knob] = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        return data

    def branches(self, call: BlockCall) -> tuple[Branch, ...]:
        """One branch per identity."""
        scale = call.numbers["id_weight"]
        return tuple(
            Branch((Segment(p.key, p.value, rows=p.rows),), weight_of(p, scale, call))
            for p in call.prompts
        )


def _reasons_against(name: str, reference: Reference) -> list[str]:
    """What is wrong with the tokens of a reference."""
    reasons = []
    embeds: Any = reference.embeds
    if embeds is not None and not _is_tokens(embeds, (2, 3)):
        reasons.append(f"{name}.embeds must be [M, C] or [P, M, C], got {_described(embeds)}")
    if reference.negative is not None and not _is_tokens(reference.negative, (2,)):
        reasons.append(f"{name}.negative must be [M, C], got {_described(reference.negative)}")
    if reference.latents is not None:
        reasons.append(f"{name}: an identity is a picture or embeds, not latents")
    return reasons


def _is_tokens(x: Any, dims: tuple[int, ...]) -> bool:
    return isinstance(x, Tensor) and x.ndim in dims and x.is_floating_point()


def _described(x: Any) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}"
