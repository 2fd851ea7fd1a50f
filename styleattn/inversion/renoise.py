"""ReNoise: every step of the inversion asks the network where it arrives, not where it starts."""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ddim
from .host import (
    Picture,
    check_host,
    device_of,
    encode_prompts,
    fingerprint,
    noise_function,
)
from .invert import as_trajectory, clean_latents, round_trip_error, steps_of
from .trajectory import Trajectory
from .walk import Advance, Callback, Checkpoint, identity, walk

_TINY = 1e-6
_CLIP = 100.0
_PATCH = 4
_COARSEST = 8


@dataclass(frozen=True)
class ReNoise:
    """The numbers of a ReNoise inversion; the defaults are those of InstantStyle-Plus.

    Args:
        steps: R, further evaluations at every step.
        most_first: at most so many below `first`.
        first: timesteps below count as the first ones.
        average: replace the last estimate by the mean of the noise of evaluations in a range.
        first_range, range: (lo, hi): evaluations lo <= i < hi are averaged; those from lo on are
            regularised. With one further evaluation (8, 10) is never reached.
        lambda_ac, lambda_kl: weights of the regularisers; both 0 leaves the noise as it is.
        rounds, rolls: of the regularisers.
        seed: of the noise that they aim at, and of their rolls.

    Raises:
        ValueError: numbers without meaning; all reasons at once.

    Source: Garibi et al., ReNoise, arXiv 2403.14602.
    """

    steps: int = 1
    most_first: int = 5
    first: int = 250
    average: bool = True
    first_range: tuple[int, int] = (0, 5)
    range: tuple[int, int] = (8, 10)
    lambda_ac: float = 20.0
    lambda_kl: float = 0.065
    rounds: int = 4
    rolls: int = 5
    seed: int = 7865

    def __post_init__(self) -> None:
        reasons = [
            f"{name} must not be negative, got {getattr(self, name)}"
            for name in ("steps", "most_first", "first", "lambda_ac", "lambda_kl", "rounds")
            if getattr(self, name) < 0
        ]
        if self.rolls < 1:
            reasons.append(f"rolls must be positive, got {self.rolls}")
        for name in ("first_range", "range"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                reasons.append(f"{name} must satisfy 0 <= lo <= hi, got {(low, high)}")
        if reasons:
            raise ValueError("ReNoise: " + "; ".join(reasons))


def renoise_invert(
    pipe: Any,
    picture: Picture | Tensor,
    prompt: str,
    *,
    settings: ReNoise = ReNoise(),
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    round_trip: bool = False,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
) -> Trajectory:
    """Invert a picture by renoising: a fixed-point iteration at every step of DDIM.

        x' <- move(x, eps(x', t)),  R + 1 times, from x' = x

    where move goes from the cleaner level to that of t. The last noise may be averaged over the
    iteration and regularised towards the statistics of true noise (`regularised`).

    Args:
        settings: of the iteration.
        pipe, picture, prompt, num_inference_steps, height, width, round_trip, callback, checkpoint,
        checkpoint_every: as in :func:`styleattn.inversion.ddim_invert`.
        guidance_scale: 1 is without guidance.

    Raises:
        HostUnsupported, ValueError, Stopped: as :func:`styleattn.inversion.ddim_invert`.

    Source: Garibi et al., ReNoise: Real Image Inversion Through Iterative Noising, arXiv
        2403.14602; the numbers of InstantStyle-Plus, arXiv 2407.00788.
    """
    check_host(pipe, "renoise_invert")
    clean, size = clean_latents(pipe, picture, height, width)
    schedule, timesteps = steps_of(pipe, num_inference_steps)
    plan = ddim.inversion_plan(timesteps[::-1], schedule.alphas_cumprod, schedule.final_alpha)
    epsilon = noise_function(pipe, encode_prompts(pipe, [prompt]), guidance_scale, *size)
    network = fingerprint(pipe.unet)
    name = identity(clean, prompt, guidance_scale, astuple(settings), timesteps, network)
    keeper = Checkpoint(checkpoint, name, checkpoint_every)
    advance = renoising(plan, epsilon, clean, settings, device_of(pipe))
    found = walk(clean, len(plan), advance, keeper, callback, len(plan))
    trajectory = as_trajectory(
        found[::-1],
        timesteps,
        schedule,
        prompt,
        guidance_scale,
        size,
        "consistent",
        "renoise",
        network,
    )
    if round_trip:
        trajectory = trajectory.with_round_trip_error(round_trip_error(pipe, trajectory))
    keeper.remove()
    return trajectory


def renoising(
    plan: list[ddim.Move],
    epsilon: ddim.Epsilon,
    clean: Tensor,
    settings: ReNoise,
    device: torch.device,
) -> Advance:
    """The moves of a plan (labels "paper"), each by iteration.

    Rolls are drawn for each step from a seed of its own, so that a walk that is taken up again ends
    with the same bits.
    """
    regularises = settings.rounds > 0 and (settings.lambda_ac > 0 or settings.lambda_kl > 0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(settings.seed))

    def advance(found: list[Tensor]) -> Tensor:
        step, here = plan[len(found) - 1], found[-1].to(device)
        early = step.label < settings.first
        low, high = settings.first_range if early else settings.range
        count = min(settings.steps, settings.most_first) if early else settings.steps
        rolls = torch.Generator().manual_seed(settings.seed + len(found))
        aim = None
        if regularises and (count >= low or not settings.average):
            forward = step.target**0.5 * clean + (1 - step.target) ** 0.5 * noise
            aim = epsilon(forward.to(device), step.label)
        there, mean, seen = here, None, 0
        for i in range(count + 1):
            eps = epsilon(there, step.label)
            if settings.average and low <= i < high:
                seen += 1
                mean = eps if mean is None else mean + (eps - mean) / seen
            if aim is not None and (i >= low or (not settings.average and i > 0)):
                eps = regularised(eps, aim, settings, rolls)
            there = ddim.move(here, eps, step.source, step.target)
        if mean is not None:
            eps = mean if aim is None else regularised(mean, aim, settings, rolls)
            there = ddim.move(here, eps, step.source, step.target)
        return there

    return advance


def regularised(
    noise: Tensor, aim: Tensor, settings: ReNoise, generator: torch.Generator
) -> Tensor:
    """Noise [1, C, h, w] with statistics nearer to those of true noise.

        rounds times:  e <- e - lambda_kl * clip(grad KL(e, aim), -100, 100)
                       rolls times:  e <- e - lambda_ac / rolls * grad AC(e)

    A result that is not finite is discarded.
    """
    found = noise
    for _ in range(settings.rounds):
        if settings.lambda_kl > 0:
            slope = _gradient(found, lambda x: patch_divergence(x, aim))
            found = found - settings.lambda_kl * slope.clamp(-_CLIP, _CLIP)
        for _ in range(settings.rolls if settings.lambda_ac > 0 else 0):
            slope = _gradient(found, lambda x: self_correlation(x, generator))
            found = found - settings.lambda_ac / settings.rolls * slope
    return found if bool(torch.isfinite(found).all()) else noise


def _gradient(x: Tensor, loss: Any) -> Tensor:
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(point), point)
    return slope


def patch_divergence(x: Tensor, aim: Tensor) -> Tensor:
    """How far the patches of x are from those of another, as if both were normal.

        sum over patches 4 x 4 of every channel of | log(v1 / v0) + (v0 + (m0 - m1)^2) / v1 - 1 |

    m0, v0 of x, m1, v1 of the other; unbiased variances, 1e-6 added to them where they divide.
    """
    (m0, v0), (m1, v1) = (_patches(t) for t in (x, aim))
    ratio = torch.log((v1 + _TINY) / (v0 + _TINY)) + (v0 + (m0 - m1) ** 2) / (v1 + _TINY) - 1
    return ratio.abs().sum()


def _patches(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every patch; rows and columns that fill no patch are left out."""
    patches = x.unfold(2, _PATCH, _PATCH).unfold(3, _PATCH, _PATCH).flatten(-2)
    return patches.mean(-1), patches.var(-1)


def self_correlation(x: Tensor, generator: torch.Generator) -> Tensor:
    """The correlation of x [1, C, h, w] with itself rolled, at every scale.

        sum over channels, scales and both axes of mean(x * roll(x, r))^2

    Scales are averages by 2 until a side is at most 8; r is drawn anew for each, 0 <= r < h / 2.
    """
    total = x.new_zeros(())
    for channel in x.split(1, dim=1):
        part = channel
        while True:
            roll = int(torch.randint(0, max(1, part.shape[2] // 2), (1,), generator=generator))
            for axis in (2, 3):
                total = total + (part * torch.roll(part, roll, dims=axis)).mean() ** 2
            if min(part.shape[2:]) <= _COARSEST:
                break
            part = F.avg_pool2d(part, 2)
    return total
