"""Inversion of a picture for flow models (FLUX.1), and sampling that records or restores, through
a pipeline's own transformer, VAE and text encoders."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import flow
from .ddim import relative_error
from .flow_host import (
    MAX_TOKENS,
    check_flow_host,
    flow_levels,
    flow_prompts,
    flow_size,
    velocity_function,
)
from .host import Picture, device_of, encode_picture, fingerprint, vae_scale
from .trajectory import Trajectory
from .walk import Advance, Callback, Checkpoint, identity, report, walk

Step = Callable[[Tensor, float, float], Tensor]
"""(x, s, s') -> x'."""

GAMMA, ETA, ETA_STEPS = 0.5, 0.9, (0.0, 0.25)


def flow_invert(
    pipe: Any,
    picture: Picture | Tensor,
    prompt: str,
    *,
    method: str = "rf_solver",
    num_inference_steps: int = 28,
    guidance_scale: float = 1.0,
    gamma: float | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int = MAX_TOKENS,
    round_trip: bool = False,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
) -> Trajectory:
    """Find the latents of a picture at every noise level of a FLUX run.

    The noise levels are those of a run of the same size and number of steps; the network is asked
    at the level of the latent that it sees.

    Args:
        pipe: a FLUX.1 pipeline with FlowMatchEulerDiscreteScheduler, which is not changed.
        picture: a PIL image or a path; or clean latents [C, h, w] or [1, C, h, w] as the
            transformer takes them, not packed.
        prompt: what the picture shows; RF-Inversion's own is empty.
        method: "euler", first order, one network call a step; "rf_solver", second order, two calls
            (:func:`styleattn.inversion.flow.rf_solver`); "rf_inversion", drawn towards noise of a
            normal distribution (:func:`styleattn.inversion.flow.towards_noise`); "noised", the
            picture under fresh noise of every level, no network asked.
        num_inference_steps: use the same number for sampling.
        guidance_scale: told to the network, where it has an embedding for it.
        gamma: of "rf_inversion": 0 follows the network, 1 leads straight to the noise; None for
            0.5. Other methods have none.
        seed: of the noise of "rf_inversion" and "noised", drawn on the CPU; None for 0.
        height, width: pixels that the picture is fitted to; the pipeline's own size if None.
            Latents bring their own.
        max_sequence_length: tokens of T5.
        round_trip: also sample back (:func:`flow_restore`) and note ‖z_0' - z_0‖ / ‖z_0‖. On
            `tiny-flux` it is about 1 with "euler", 0.04 with "rf_solver" and 0.5 with
            "rf_inversion" (16 steps), whose way back is drawn to the picture at first only.
        callback, checkpoint, checkpoint_every: as in :func:`styleattn.inversion.ddim_invert`.

    Returns:
        the trajectory; computed in fp32 between network calls, which are in the network's dtype.

    Raises:
        HostUnsupported: a pipeline that this cannot run on.
        ValueError: unreadable picture, wrong latents, sizes, steps, method or knobs; a checkpoint
            of another inversion.
        Stopped: the callback returned False.
    """
    check_flow_host(pipe, "flow_invert")
    _check_knobs(method, gamma, seed, round_trip)
    clean, size = _clean(pipe, picture, height, width)
    levels = flow_levels(pipe, num_inference_steps, *size)
    network = fingerprint(pipe.transformer)
    settings = (method, guidance_scale, gamma, seed, max_sequence_length)
    name = identity(clean, prompt, *settings, levels, network)
    keeper = Checkpoint(checkpoint, name, checkpoint_every)
    generator = torch.Generator().manual_seed(seed or 0)
    total = len(levels[1:]) * (2 if round_trip else 1)
    if method == "noised":
        found = [flow.noised(clean, _noise(clean, generator), s) for s in levels[:-1]] + [clean]
    else:
        prompts = flow_prompts(pipe, [prompt], max_sequence_length=max_sequence_length)
        velocity = velocity_function(pipe, prompts, guidance_scale)
        step = _step(method, velocity, _noise(clean, generator), gamma)
        forward = _moving(pipe, levels[::-1], step)
        found = walk(clean, len(levels) - 1, forward, keeper, callback, total)[::-1]
    facts = (prompt, guidance_scale, size, method, network)
    trajectory = _trajectory(found, levels, *facts)
    if round_trip:
        restored = flow_restore(
            pipe,
            trajectory,
            max_sequence_length=max_sequence_length,
            callback=None if callback is None else lambda i, n: callback(n + i, total),
        )
        error = relative_error(restored, clean)
        trajectory = trajectory.with_round_trip_error(error)
    keeper.remove()
    return trajectory


def flow_sample(
    pipe: Any,
    prompt: str,
    *,
    seed: int = 0,
    num_inference_steps: int = 28,
    guidance_scale: float = 3.5,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int = MAX_TOKENS,
    callback: Callback | None = None,
) -> Trajectory:
    """Make a picture from a prompt with Euler steps and keep every latent: a reference that needs
    no inversion.

    Args:
        seed: of the starting noise, drawn on the CPU.
        pipe, prompt, num_inference_steps, guidance_scale, height, width, max_sequence_length,
            callback: as in :func:`flow_invert`.

    Raises:
        HostUnsupported, ValueError, Stopped: as :func:`flow_invert`.
    """
    check_flow_host(pipe, "flow_sample")
    size = flow_size(pipe, height, width)
    levels = flow_levels(pipe, num_inference_steps, *size)
    prompts = flow_prompts(pipe, [prompt], max_sequence_length=max_sequence_length)
    velocity = velocity_function(pipe, prompts, guidance_scale)
    shape = (1, pipe.vae.config.latent_channels, *(s // vae_scale(pipe) for s in size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    step = _step("euler", velocity, noise, None)
    keeper, count = Checkpoint(None, "", 1), len(levels) - 1
    found = walk(noise, count, _moving(pipe, levels, step), keeper, callback, count)
    network = fingerprint(pipe.transformer)
    return _trajectory(found, levels, prompt, guidance_scale, size, "sample", network)


def flow_restore(
    pipe: Any,
    trajectory: Trajectory,
    *,
    prompt: str | None = None,
    eta: float | None = None,
    steps: tuple[float, float] = ETA_STEPS,
    power: float = 0.0,
    max_sequence_length: int = MAX_TOKENS,
    callback: Callback | None = None,
) -> Tensor:
    """Sample from the noise of a trajectory back to data, with the solver that inverted it.

        step i of n, start <= i/n < end:  v' = v + η_i·((x - x0)/s - v),  η_i = eta·(1 - i/n)^power

    Args:
        prompt: another one edits the picture; None for the trajectory's own.
        eta: how strongly the way is drawn towards the picture
            (:func:`styleattn.inversion.flow.towards_data`); None for 0.9 where the trajectory is of
            "rf_inversion", else 0.
        steps: (start, end), fractions of the run in which it is.
        power: how eta falls over the run; 0 is constant.
        max_sequence_length, callback: as in :func:`flow_invert`.

    Returns:
        [1, C, h, w] fp32 on the CPU.

    Raises:
        HostUnsupported: a pipeline that this cannot run on.
        ValueError: knobs without a meaning; a trajectory of no flow model, of another network, or
            "noised", from which no way leads back.
        Stopped: the callback returned False.

    Source: Rout et al., arXiv 2410.10792, algorithm 2.
    """
    check_flow_host(pipe, "flow_restore")
    reasons = []
    if trajectory.labels != "flow" or trajectory.method == "noised":
        reasons.append(f"no way back from a trajectory of {trajectory.method!r}")
    elif trajectory.fingerprint not in ("", fingerprint(pipe.transformer)):
        reasons.append("the trajectory was made with another network")
    eta = (ETA if trajectory.method == "rf_inversion" else 0.0) if eta is None else eta
    if not 0 <= eta <= 1:
        reasons.append(f"eta must lie in [0, 1], got {eta}")
    if len(steps) != 2 or not 0 <= steps[0] <= steps[1] <= 1:
        reasons.append(f"steps must be (start, end) with 0 <= start <= end <= 1, got {steps!r}")
    if power < 0:
        reasons.append(f"power must not be negative, got {power}")
    if reasons:
        raise ValueError("flow_restore: " + "; ".join(reasons))
    told = trajectory.prompt if prompt is None else prompt
    prompts = flow_prompts(pipe, [told], max_sequence_length=max_sequence_length)
    velocity = velocity_function(pipe, prompts, trajectory.guidance_scale)
    levels = (1.0 - trajectory.alphas).tolist()
    plain = flow.rf_solver if trajectory.method == "rf_solver" else flow.euler
    x, device, count = trajectory.latents[:1], device_of(pipe), len(trajectory)
    x, clean = x.to(device), trajectory.latents[-1:].to(device)
    for i, (source, target) in enumerate(itertools.pairwise(levels)):
        here = eta * (1 - i / count) ** power if steps[0] <= i / count < steps[1] else 0.0
        if here:
            x = flow.towards_data(x, velocity, source, target, clean, here)
        else:
            x = plain(x, velocity, source, target)
        report(callback, i + 1, count, None)
    return x.cpu()


def _check_knobs(method: str, gamma: float | None, seed: int | None, round_trip: bool) -> None:
    reasons = []
    if method not in flow.METHODS:
        reasons.append(f"method must be one of {flow.METHODS}, got {method!r}")
    if gamma is not None and method != "rf_inversion":
        reasons.append(f"{method} has no gamma")
    if gamma is not None and not 0 <= gamma <= 1:
        reasons.append(f"gamma must lie in [0, 1], got {gamma}")
    if seed is not None and method not in ("rf_inversion", "noised"):
        reasons.append(f"{method} draws no noise, so it has no seed")
    if round_trip and method == "noised":
        reasons.append("no way leads back from noised latents: round_trip has no meaning")
    if reasons:
        raise ValueError("flow_invert: " + "; ".join(reasons))


def _clean(
    pipe: Any, picture: Picture | Tensor, height: int | None, width: int | None
) -> tuple[Tensor, tuple[int, int]]:
    """[1, C, h, w] fp32 on the CPU and the size in pixels."""
    if not isinstance(picture, Tensor):
        size = flow_size(pipe, height, width)
        return encode_picture(pipe, picture, *size)[None], size
    latents = picture.detach().float().cpu()
    latents = latents[None] if latents.ndim == 3 else latents
    channels = pipe.vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[:2] != (1, channels):
        raise ValueError(f"latents must be [{channels}, h, w], got {list(picture.shape)}")
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents are not finite")
    scale = vae_scale(pipe)
    found = flow_size(pipe, latents.shape[2] * scale, latents.shape[3] * scale)
    if (height, width) not in ((None, None), found):
        raise ValueError(
            f"latents are of a {found[0]} x {found[1]} picture, not {height} x {width}"
        )
    return latents, found


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def _step(method: str, velocity: flow.Velocity, noise: Tensor, gamma: float | None) -> Step:
    """A solver as a function of a latent and two levels."""
    if method != "rf_inversion":
        solver = flow.rf_solver if method == "rf_solver" else flow.euler
        return lambda x, source, target: solver(x, velocity, source, target)
    drawn = GAMMA if gamma is None else gamma

    def controlled(x: Tensor, source: float, target: float) -> Tensor:
        return flow.towards_noise(x, velocity, source, target, noise.to(x.device), drawn)

    return controlled


def _moving(pipe: Any, levels: list[float], step: Step) -> Advance:
    """The steps over levels, one after the other, where the pipeline computes."""

    def advance(found: list[Tensor]) -> Tensor:
        i = len(found) - 1
        return step(found[-1].to(device_of(pipe)), levels[i], levels[i + 1])

    return advance


def _trajectory(
    latents: list[Tensor],
    levels: list[float],
    prompt: str,
    guidance_scale: float,
    size: tuple[int, int],
    method: str,
    network: str,
) -> Trajectory:
    stacked = torch.cat(latents)
    if not bool(torch.isfinite(stacked).all()):
        raise ValueError(
            "the latents became infinite or NaN on the way"
            " (a transformer in float16 that needs bfloat16 or float32?)"
        )
    exact = torch.tensor(levels, dtype=torch.float64)
    return Trajectory(
        latents=stacked,
        timesteps=1000 * exact[:-1],
        alphas=1.0 - exact,
        prompt=prompt,
        guidance_scale=float(guidance_scale),
        height=size[0],
        width=size[1],
        labels="flow",
        method=method,
        fingerprint=network,
    )
