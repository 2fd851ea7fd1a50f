"""StyleAligned MultiDiffusion: a panorama whose every window shares the style of one reference."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from styleattn.inversion import Prompts, Trajectory, encode_prompts
from styleattn.inversion.host import (
    check_host,
    decode_latents,
    default_size,
    device_of,
    time_ids,
    vae_scale,
)
from styleattn.methods import StyleAligned
from styleattn.processors import apply


@dataclass(frozen=True)
class Panorama:
    """A panorama and the reference picture that was made along with it."""

    image: Image.Image
    reference: Image.Image


@dataclass(frozen=True)
class _Run:
    """What stays the same over the steps of one panorama."""

    pipe: Any
    prompts: Prompts  # two rows: reference, panorama
    guidance_scale: float
    window: tuple[int, int]  # latents
    views: list[list[tuple[int, int]]]  # batches of top left corners
    trajectory: Trajectory | None
    random: dict[str, torch.Generator]  # for schedulers that draw noise


def view_corners(
    height: int, width: int, window: tuple[int, int], stride: int
) -> list[tuple[int, int]]:
    """The top left corners of the windows over a map, row by row; the last of each row and column
    touches the edge."""

    def along(length: int, size: int) -> list[int]:
        starts = list(range(0, max(length - size, 0) + 1, stride))
        return starts if starts[-1] + size >= length else [*starts, length - size]

    return [(y, x) for y in along(height, window[0]) for x in along(width, window[1])]


def panorama(
    pipe: Any,
    prompt: str,
    reference_prompt: str,
    *,
    height: int,
    width: int,
    trajectory: Trajectory | None = None,
    method: StyleAligned | None = None,
    negative_prompt: str | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    stride: int = 8,
    view_batch_size: int = 25,
    seed: int = 0,
    backend: str | None = None,
    callback: Callable[[int, int], object] | None = None,
) -> Panorama:
    """Make a panorama out of overlapping windows that are denoised as images aligned with one
    reference.

    At every step each batch of windows is denoised together with the reference as its row 0;
    overlapping results are averaged, x ← Σ_views x_view / count, and the reference advances with
    the last batch. (Its own result does not depend on the windows, so neither does the panorama
    depend on ``view_batch_size`` beyond rounding.)

    Args:
        pipe: a Stable Diffusion 1, 2 or XL pipeline; windows have the size of its pictures.
        prompt, reference_prompt: of the panorama and of the reference.
        height, width: of the panorama in pixels, at least one window.
        trajectory: of a real reference picture, at window size; None makes the reference from its
            prompt.
        method: None for ``StyleAligned()``.
        stride: of the windows, in latents.
        view_batch_size: windows per UNet call; the memory knob.
        seed: of the noise, drawn on the CPU.
        callback: called with (steps done, all steps).

    Raises:
        HostUnsupported: a pipeline that this cannot run on.
        ValueError: sizes, strides or batch sizes without meaning; a trajectory of another size.

    Source: StyleAligned (arXiv 2312.02133) with MultiDiffusion (arXiv 2302.08113), algorithm 1.
    """
    check_host(pipe, "panorama")
    size = _size(pipe, height, width, stride, view_batch_size, trajectory)
    own = default_size(pipe)
    window = (own[0] // vae_scale(pipe), own[1] // vae_scale(pipe))
    corners = view_corners(*size, window, stride)
    views = [corners[i : i + view_batch_size] for i in range(0, len(corners), view_batch_size)]
    prompts = encode_prompts(pipe, [reference_prompt, prompt], negative_prompt)
    generator = torch.Generator().manual_seed(seed)
    draws = "generator" in inspect.signature(pipe.scheduler.step).parameters
    random = {"generator": generator} if draws else {}
    run = _Run(pipe, prompts, guidance_scale, window, views, trajectory, random)
    channels = pipe.unet.config.in_channels
    shapes = ((1, channels, *window), (1, channels, *size))
    noise = [torch.randn(shape, generator=generator).to(device_of(pipe)) for shape in shapes]
    chunks = 2 if guidance_scale > 1 else 1
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps, device=device_of(pipe))
    reference, latents = (x * scheduler.init_noise_sigma for x in noise)
    schedulers = [copy.deepcopy(scheduler) for _ in views]
    with (
        apply(pipe, method or StyleAligned(), backend=backend) as handle,
        handle.layout(chunks=chunks, timesteps=scheduler.timesteps),
    ):
        for i, t in enumerate(scheduler.timesteps):
            reference, latents = _step(run, schedulers, t, reference, latents)
            if callback is not None:
                callback(i + 1, len(scheduler.timesteps))
    clean = trajectory.latents[-1:] if trajectory is not None else reference
    return Panorama(decode_latents(pipe, latents)[0], decode_latents(pipe, clean)[0])


def _step(
    run: _Run, schedulers: list[Any], t: Tensor, reference: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor]:
    """One denoising step of the reference and of all windows."""
    total, count = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
    advanced = reference
    for scheduler, corners in zip(schedulers, run.views, strict=True):
        boxes = list(_boxes(corners, run.window))
        rows = torch.cat([reference, *(latents[box] for box in boxes)])
        output = _predict(run, scheduler, t, rows)
        rows = scheduler.step(output, t, rows, **run.random).prev_sample
        advanced = rows[:1]
        for box, row in zip(boxes, rows[1:].split(1), strict=True):
            total[box] += row
            count[box] += 1
    return advanced, total / count


def _boxes(corners: list[tuple[int, int]], window: tuple[int, int]) -> Iterator[tuple[slice, ...]]:
    every = slice(None)
    for y, x in corners:
        yield every, every, slice(y, y + window[0]), slice(x, x + window[1])


def _predict(run: _Run, scheduler: Any, t: Tensor, rows: Tensor) -> Tensor:
    """The UNet's guided output for the rows [reference, windows...]."""
    unet, p = run.pipe.unet, run.prompts
    guided = run.guidance_scale > 1
    x = scheduler.scale_model_input(rows, t)
    if run.trajectory is not None:
        step = run.trajectory.step_of(float(t))
        given = run.trajectory.latents[run.trajectory.reference_index(step)]
        x = torch.cat([given[None].to(x), x[1:]])
    order = [0] + [1] * (len(rows) - 1)
    halves = [p.negative_embeds[order], p.embeds[order]] if guided else [p.embeds[order]]
    added = None
    if p.pooled is not None and p.negative_pooled is not None:
        pooled = [p.negative_pooled[order], p.pooled[order]] if guided else [p.pooled[order]]
        ids = time_ids(run.pipe, *default_size(run.pipe)).expand(len(pooled) * len(rows), -1)
        added = {"text_embeds": torch.cat(pooled).to(unet.dtype), "time_ids": ids}
    with torch.no_grad():
        output = unet(
            torch.cat([x] * len(halves)).to(unet.dtype),
            t,
            encoder_hidden_states=torch.cat(halves).to(unet.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()
    if not guided:
        return output
    uncond, cond = output.chunk(2)
    return uncond + run.guidance_scale * (cond - uncond)


def _size(
    pipe: Any,
    height: int,
    width: int,
    stride: int,
    view_batch_size: int,
    trajectory: Trajectory | None,
) -> tuple[int, int]:
    """The panorama's size in latents."""
    scale, window = vae_scale(pipe), default_size(pipe)
    if height % scale or width % scale or height < window[0] or width < window[1]:
        raise ValueError(
            f"panorama: height and width must be multiples of {scale} and at least "
            f"{window[0]} x {window[1]}, got {height} x {width}"
        )
    if stride < 1 or stride > min(window) // scale:
        raise ValueError(f"panorama: stride must lie in 1..{min(window) // scale}, got {stride}")
    if view_batch_size < 1:
        raise ValueError(f"panorama: view_batch_size must be at least 1, got {view_batch_size}")
    if trajectory is not None and (trajectory.height, trajectory.width) != window:
        found = f"{trajectory.height} x {trajectory.width}"
        raise ValueError(
            f"panorama: the reference is {found}, windows are {window[0]} x {window[1]}"
        )
    return height // scale, width // scale
