"""USO on FLUX: the style of a picture as tokens behind the model's text embedder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._facts import Facts
from ._tokens import TokenSettings


@dataclass(frozen=True, kw_only=True)
class USO(TokenSettings):
    """USO's style pictures: 3 x 64 tokens of SigLIP's levels in the sequence of the text.

        logit(i, j) += log s_r    for the tokens j of picture r, seen from any token i but its own

    The tokens have the transformer's own width and enter behind its text embedder; s_r is a
    picture's weight times `strength`, 1 in the original. The unconditional call of true guidance
    has none. USO's LoRA belongs to it (`load_lora_weights`), and its content pictures are
    `InContext(positions="diagonal")` next to it.

    Args:
        references: style pictures: `image` with an adapter, or `embeds` [M, C] or, one per prompt,
            [P, M, C]: the projector's tokens; with an adapter SigLIP's hidden states -2, -11 and
            -20, [3, S, width] or [P, 3, S, width]. Their weights, steps, layers, masks (of the
            image tokens; text sees the mask's mean) and `prompts` hold.
        adapter: what makes tokens of SigLIP's levels (`styleattn.adapters.load_uso`), or its file.
        image_encoder: SigLIP, or its folder; None for the pipeline's.
        strength: s, of all pictures; 0 is the model without them.
        layers: which layers see the pictures.
        steps: when: (start, end) fractions of the run, or a curve of weights.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Wu et al., USO, arXiv 2508.18966; bytedance/USO.
    """

    name: ClassVar[str] = "uso"
    NUMBERS: ClassVar[tuple[str, ...]] = ("strength",)
    facts: ClassVar[Facts] = Facts(
        paper="USO, arXiv 2508.18966",
        modality="text, image",
        route="encoder",
        hosts="FLUX.1",
        needs="prompts, style pictures, USO's projector and LoRA, SigLIP",
        weights="bytedance-research/USO, Apache-2.0",
    )

    def __post_init__(self) -> None:
        self._refuse(self._strengths())

    @property
    def embedded(self) -> bool:
        """They enter behind the text embedder."""
        return True

    def _shapes(self) -> tuple[str, ...]:
        return ("MC", "PMC") if self.adapter is None else ("3SC", "P3SC")
