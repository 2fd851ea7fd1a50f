"""One batch of pictures through a pipeline with a method at work: what recipes share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from styleattn.inversion import Trajectory
from styleattn.inversion.flow_host import packed
from styleattn.inversion.host import Picture
from styleattn.processors import apply
from styleattn.processors.bank import input_scale
from styleattn.processors.features import FeatureCache
from styleattn.references import Reference, StyleBank

from .hosts import host_of
from .sampling import Sampling, generate
from .sources import Source


@dataclass(frozen=True)
class Drawing:
    """One batch.

    Args:
        method: what is at work.
        sampling, backend: of the job.
        bank: the rows of the recipe's roles; None where it has none.
        content, style: trajectories' latents [N + 1, C, h, w], from noise to data, where there are
            such pictures.
        sources: the style pictures as they were given: picture, prompt and weight.
        prompts, seeds: one for each picture.
        picture: the content picture as it was given.
        control_scale: of the pipeline's ControlNet; None for the recipe's own.
        features: of the job.
        filling: of the job.
        whole: keeps a canvas that a picture is cut from: called with its number and the canvas.
        seed: of the job; reference i that is made from a prompt is drawn from ``seed + i``.
        callback: called with (steps done, steps).
    """

    pipe: Any
    method: Any
    sampling: Sampling
    backend: str | None
    bank: StyleBank | FeatureCache | None
    content: Trajectory | None
    style: Tensor | None
    prompts: Sequence[str]
    seeds: Sequence[int]
    sources: Sequence[Source] = ()
    picture: Picture | None = None
    control_scale: float | None = None
    features: str | None = None
    filling: Any = None
    whole: Callable[[int, Image.Image], None] | None = None
    seed: int = 0
    callback: Callable[[int, int], None] | None = None

    def generate(self, *methods: Any, **arguments: Any) -> list[Image.Image]:
        """The batch with these methods (None: the job's), and further arguments of the pipeline's
        call."""
        with apply(self.pipe, *(methods or (self.method,)), bank=self.bank, backend=self.backend):
            return generate(
                self.pipe,
                self.prompts,
                self.seeds,
                self.sampling,
                callback=self.callback,
                **arguments,
            )

    def start(self, latents: Tensor) -> Tensor:
        """Latents [C, h, w] of the first step's noise level, as the pipeline's call takes them:
        [n, C, h, w], on FLUX packed."""
        if host_of(self.pipe) == "flux":
            tokens = packed(latents[None]).to(self.pipe.transformer.dtype)
            return tokens.repeat(len(self.prompts), 1, 1)
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(self.sampling.num_inference_steps)
        scale = input_scale(scheduler, scheduler.timesteps[0]) * float(scheduler.init_noise_sigma)
        rows = (latents / scale).to(self.pipe.unet.dtype)
        return rows.expand(len(self.prompts), *latents.shape).clone()


def draw(drawing: Drawing) -> list[Image.Image]:
    """Pictures from noise of their seeds; from the content's noise where there is content."""
    if drawing.content is None:
        return drawing.generate()
    return drawing.generate(latents=drawing.start(drawing.content.latents[0]))


def beside(drawing: Drawing) -> list[Image.Image]:
    """Pictures next to references that are made from their prompts, as the first rows of the batch;
    with a bank as `draw`."""
    if drawing.bank is not None:
        return draw(drawing)
    method, sources = drawing.method, drawing.sources
    if method.references is None:
        method = replace(method, references=tuple(Reference(weight=s.weight) for s in sources))
    seeds = [drawing.seed + i for i in range(len(sources))]
    whole = replace(
        drawing,
        prompts=[*(s.prompt for s in sources), *drawing.prompts],
        seeds=[*seeds, *drawing.seeds],
    )
    return whole.generate(method)[len(sources) :]


def adain(x: Tensor, style: Tensor, share: float = 1.0) -> Tensor:
    """Latents [C, h, w] with the style's mean and (unbiased) deviation in every channel.

        (x - mean(x)) / std(x) * std + mean,  mean = share * mean(style) + (1 - share) * mean(x),
        std likewise

    A channel without variance gets the mean.
    """
    (mean, std), (to_mean, to_std) = (
        (y.mean((1, 2), keepdim=True), y.std((1, 2), keepdim=True)) for y in (x, style)
    )
    to_mean, to_std = torch.lerp(mean, to_mean, share), torch.lerp(std, to_std, share)
    flat = std == 0
    gain = torch.where(flat, 0.0, to_std / std.masked_fill(flat, 1.0))
    return (x - mean) * gain + to_mean
