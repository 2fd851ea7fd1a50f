"""No inversion at all: a picture under fresh noise of every level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ddim
from .host import Picture, check_host, fingerprint
from .invert import as_trajectory, clean_latents, steps_of
from .trajectory import Trajectory


def noised(
    pipe: Any,
    picture: Picture | Tensor,
    prompt: str,
    *,
    seed: int = 0,
    num_inference_steps: int = 50,
    height: int | None = None,
    width: int | None = None,
) -> Trajectory:
    """The latents of a picture with noise of every level, drawn anew for each.

        z_i = sqrt(alpha_i) * z_0 + sqrt(1 - alpha_i) * n_i

    What reference-only shows to the network; no network is asked. Sampling from the noisiest latent
    does not lead back to the picture.

    Args:
        seed: of the noise, drawn on the CPU, noisiest level first.
        pipe, picture, prompt, num_inference_steps, height, width: as in
            :func:`styleattn.inversion.ddim_invert`.

    Raises:
        HostUnsupported, ValueError: as :func:`styleattn.inversion.ddim_invert`.
    """
    check_host(pipe, "noised")
    clean, size = clean_latents(pipe, picture, height, width)
    schedule, timesteps = steps_of(pipe, num_inference_steps)
    levels = ddim.levels(timesteps, schedule.alphas_cumprod, schedule.final_alpha)[:-1]
    generator = torch.Generator().manual_seed(seed)
    latents = []
    for alpha in levels:
        noise = torch.randn(clean.shape, generator=generator)
        latents.append(alpha**0.5 * clean.cpu() + (1 - alpha) ** 0.5 * noise)
    latents.append(clean.cpu())
    network = fingerprint(pipe.unet)
    return as_trajectory(
        latents, timesteps, schedule, prompt, 1.0, size, "consistent", "noised", network
    )
