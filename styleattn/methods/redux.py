"""FLUX.1 Redux: pictures as tokens next to the text, each with a strength of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from styleattn.references import Reference

from ._base import Number, log, off
from ._facts import Facts
from ._joint import JointCall, seen_by
from ._tokens import TokenSettings

STRENGTH_BY = ("bias", "key_bias", "tokens")
DOWNSAMPLE_BY = ("mixed", "area")
RESTYLING = 0.1


@dataclass(frozen=True, kw_only=True)
class Redux(TokenSettings):
    """FLUX.1 Redux with any number of pictures, each a segment of the joint attention.

        logit(i, j) += log s_r    for the tokens j of picture r, seen from any token i but its own

    The tokens of every picture stand behind the prompt's, as in the original; s_r is its weight
    times `strength`. A strength of 0 is the model without the picture. The unconditional call of
    true guidance has no pictures.

    Args:
        references: pictures: `image` with an adapter, or `embeds` [M, C] or, one per prompt,
            [P, M, C]: the tokens that Redux' image embedder makes of SigLIP's output; with an
            adapter SigLIP's output itself. Their weights, steps, layers, masks (of the image
            tokens; text sees the mask's mean) and `prompts` hold.
        adapter: what makes tokens of SigLIP's output (`styleattn.adapters.load_redux`), or its
            file.
        image_encoder: SigLIP, or its folder; None for the pipeline's.
        strength: s, of all pictures.
        strength_by: "bias" is the formula above; "key_bias" adds log s for the picture's own tokens
            too; "tokens" multiplies the tokens instead, before the model's first layer.
        downsample: f; the grid of tokens is resized to 1 / f of its side before it is used.
        zero_prompt: zeros in place of T5's tokens and of CLIP's vector, as from diffusers' prior
            without text encoders. An empty prompt is another thing: it has embeddings of its own.
        downsample_by: "mixed" rounds the side down and resizes bicubically, by area for f = 3;
            "area" rounds it to the nearest and resizes by area.
        layers: which layers see the pictures.
        steps: when: (start, end) fractions of the run, or a curve of weights.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Black Forest Labs, FLUX.1 Redux [dev]; strength as a bias: ComfyUI, apply style model;
        resized grids: ComfyUI_AdvancedRefluxControl.
    """

    strength_by: str = "bias"
    downsample: float = 1.0
    downsample_by: str = "mixed"
    zero_prompt: bool = False

    name: ClassVar[str] = "redux"
    NUMBERS: ClassVar[tuple[str, ...]] = ("strength",)
    facts: ClassVar[Facts] = Facts(
        paper="FLUX.1 Redux [dev], Black Forest Labs",
        modality="text, image",
        route="encoder",
        hosts="FLUX.1",
        needs="prompts, pictures as Redux tokens (SigLIP and the image embedder)",
        weights="black-forest-labs/FLUX.1-Redux-dev, non-commercial",
    )

    def __post_init__(self) -> None:
        reasons = self._strengths("downsample")
        if not reasons and self.downsample < 1:
            reasons.append(f"downsample must be at least 1, got {self.downsample}")
        reasons += self._wrong_flags("zero_prompt")
        for knob, known in (("strength_by", STRENGTH_BY), ("downsample_by", DOWNSAMPLE_BY)):
            if getattr(self, knob) not in known:
                reasons.append(f"{knob} must be one of {known}, got {getattr(self, knob)!r}")
        self._refuse(reasons)

    @classmethod
    def restyling(cls, *, image_prompt_strength: float = RESTYLING, **knobs: Any) -> Redux:
        """A picture restyled by a prompt, after the Redux of FLUX1.1 [pro] Ultra: the whole prompt,
        and the picture at a small strength.

        It is an emulation. The weights of [pro] are not public and nobody has printed what its
        strength does; here it is s of the formula above, on the weights of Redux [dev]: 0 is the
        prompt alone, 1 Redux as it is. What matches the same number there is not known.

        Args:
            image_prompt_strength: s; 0.1 is that API's default.
            knobs: further ones; not `strength`, `strength_by`, `zero_prompt`.

        Raises:
            ValueError: an image_prompt_strength outside [0, 1], knobs without a meaning here.
        """
        taken = [k for k in ("strength", "strength_by", "zero_prompt") if k in knobs]
        reasons = [f"{', '.join(taken)} have no place here"] if taken else []
        s = image_prompt_strength
        if isinstance(s, bool) or not isinstance(s, (int, float)) or not 0 <= s <= 1:
            reasons.append(f"image_prompt_strength must lie in [0, 1], got {s!r}")
        if reasons:
            raise ValueError(f"Redux.restyling: {'; '.join(reasons)}")
        return cls(strength=float(s), **knobs)

    def _against(self, index: int, reference: Reference) -> list[str]:
        found = super()._against(index, reference)
        x: Any = reference.embeds
        if found or x is None or self.downsample <= 1:
            return found
        if math.isqrt(x.shape[-2]) ** 2 != x.shape[-2]:
            return [f"references[{index}]: downsample needs a square of tokens, not {x.shape[-2]}"]
        return []

    def context(self, embeds: Tensor) -> Tensor:
        """The tokens [P, M, C] of a picture, on the smaller grid where one is wanted."""
        tokens = embeds[None] if embeds.ndim == 2 else embeds
        if self.downsample == 1:
            return tokens
        side = math.isqrt(tokens.shape[1])
        area = self.downsample_by == "area"
        small = max(1, round(side / self.downsample) if area else int(side // self.downsample))
        grid = tokens.transpose(1, 2).unflatten(2, (side, side)).float()
        if area or self.downsample == 3:
            grid = F.interpolate(grid, (small, small), mode="area")
        else:
            grid = F.interpolate(grid, (small, small), mode="bicubic")
        return grid.flatten(2).transpose(1, 2).to(embeds.dtype)

    def weighed(self, tokens: Tensor, strength: Number) -> Tensor:
        """The tokens times their strength, where that is how it acts."""
        return tokens * (strength * self.strength) if self.strength_by == "tokens" else tokens

    def _bias(self, call: JointCall, reference: int, part: str) -> Number:
        """On the logits of a picture's tokens, for the queries of a run."""
        own = part == call.runs[reference]
        if own and self.strength_by != "key_bias":
            return 0.0
        if self.strength_by == "tokens":
            here = 0.0 if off(call.strengths[reference]) else 1.0
            return seen_by(call, reference, part, here)
        bias = seen_by(call, reference, part)
        return bias + log(call.numbers["strength"])
