"""What a bank of references needs from a FLUX pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from styleattn.inversion import Trajectory, fingerprint, flow_invert, flow_sample
from styleattn.inversion.flow_host import MAX_TOKENS, check_flow_host, flow_levels, flow_prompts
from styleattn.references import Reference

from ._flux_controller import reads_rows
from ._flux_network import network_facts
from .flux import joint_attention_layers

STEPS, PICTURE_GUIDANCE, SAMPLE_GUIDANCE = 28, 1.0, 3.5
INVERSION = "rf_solver"


class FluxPictures:
    """Trajectories and conditions of references on a FLUX pipeline.

    Args:
        inversion: the `method` of `styleattn.inversion.flow_invert`; None for "rf_solver".
        max_sequence_length: tokens of T5; None for 512.
    """

    def __init__(self, pipe: Any, inversion: str | None, max_sequence_length: int | None):
        check_flow_host(pipe, "build_bank")
        self.pipe, self.model = pipe, pipe.transformer
        self.inversion = inversion or INVERSION
        self.tokens = MAX_TOKENS if max_sequence_length is None else max_sequence_length

    @staticmethod
    def serves(method: Any) -> bool:
        """Whether a bank is of use for a method."""
        return reads_rows(method)

    def layers(self) -> Sequence[str]:
        """Names of the layers that a reference may choose from."""
        return list(joint_attention_layers(self.model))

    def trajectory(
        self, reference: Reference, seed: int, guidance_scale: float | None, options: dict[str, Any]
    ) -> Trajectory:
        """A given one, an inverted picture, or a sampled prompt.

        Raises:
            ValueError: a trajectory of another schedule.
        """
        given, steps = reference.latents, options["num_inference_steps"]
        options = {
            **options,
            "num_inference_steps": STEPS if steps is None else steps,
            "max_sequence_length": self.tokens,
        }
        if isinstance(given, Trajectory):
            if given.labels != "flow":
                raise ValueError("the trajectory is one of a diffusion model, not of a flow")
            levels = flow_levels(self.pipe, len(given), given.height, given.width)[:-1]
            expected = 1000 * torch.tensor(levels, dtype=torch.float64)
            if not torch.allclose(expected, given.timesteps.double(), atol=1e-2):
                raise ValueError(
                    "the trajectory was made for another scheduler: its timesteps differ"
                )
            return given
        picture = reference.image if given is None else given
        guided = bool(self.model.config.guidance_embeds)
        if picture is None:
            usual = SAMPLE_GUIDANCE if guided else 1.0
            scale = usual if guidance_scale is None else guidance_scale
            return flow_sample(
                self.pipe, reference.prompt, seed=seed, guidance_scale=scale, **options
            )
        scale = PICTURE_GUIDANCE if guidance_scale is None else guidance_scale
        drawn = seed if self.inversion in ("rf_inversion", "noised") else None
        return flow_invert(
            self.pipe,
            picture,
            reference.prompt,
            method=self.inversion,
            guidance_scale=scale,
            seed=drawn,
            **options,
        )

    def conditions(
        self, prompts: Sequence[str], negative: str | None, trajectory: Trajectory
    ) -> dict[str, Tensor | None]:
        """What the transformer is told for each reference."""
        told = flow_prompts(self.pipe, prompts, negative, self.tokens)
        return {
            "prompt_embeds": told.embeds,
            "negative_prompt_embeds": told.negative_embeds,
            "text_embeds": told.pooled,
            "negative_text_embeds": told.negative_pooled,
        }

    def facts(self) -> dict[str, Any]:
        """What tells the model from others."""
        return {"model": fingerprint(self.model), "network": network_facts(self.model)}

    def offset(self, trajectories: Sequence[Trajectory]) -> int:
        """Every step sees its own noise level."""
        return 0
