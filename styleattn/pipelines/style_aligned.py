"""StyleAligned from a picture to prompts: invert the reference once, then any number of images in
batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from styleattn.inversion import (
    Trajectory,
    belm_invert,
    ddim_invert,
    ddim_sample,
    flow_invert,
    flow_sample,
    noised,
    renoise_invert,
)
from styleattn.inversion.ddim import LABELS
from styleattn.inversion.host import Picture
from styleattn.methods import StyleAligned
from styleattn.processors import apply, paused
from styleattn.processors.bank import build_bank, reference_callback
from styleattn.references import Reference, StyleBank

from .hosts import host_of, max_tokens
from .sampling import Callback, Sampling, batches, generate

TRANSFER = StyleAligned(shared_score_shift=log(2))
"""The paper's setting for transfer from one's own picture; for famous ones: scale 0.5, shift 0."""

INVERSIONS = ("ddim", "renoise", "belm", "noise")
FLOW_INVERSIONS = ("rf_solver", "euler", "rf_inversion", "noise")
"""On FLUX."""


@dataclass(frozen=True)
class Inversion:
    """How a reference picture is inverted and shown.

    Args:
        guidance_scale: of the inversion.
        labels: "paper" or "consistent" (:func:`styleattn.inversion.ddim_invert`).
        offset: how many steps cleaner than its label the reference starts; None is the paper's 5
            for a picture inverted with the paper's labels, and 0 for every other reference: then
            each latent has the noise level that the UNet is told.
        kind: "ddim", "renoise", "belm" (exact) or "noise" (none: fresh noise at every level);
            labels are those of "ddim". On FLUX "rf_solver", "euler", "rf_inversion" or "noise".

    Raises:
        ValueError: a guidance scale that is no number, or unknown labels or kind.
    """

    guidance_scale: float = 2.0
    labels: str = "paper"
    offset: int | None = None
    kind: str = "ddim"

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(
                f"guidance_scale of the inversion must be finite and >= 0, got "
                f"{self.guidance_scale}"
            )
        if self.labels not in LABELS:
            raise ValueError(f"unknown labels {self.labels!r}: expected one of {LABELS}")
        known = tuple(dict.fromkeys((*INVERSIONS, *FLOW_INVERSIONS)))
        if self.kind not in known:
            raise ValueError(f"unknown inversion {self.kind!r}: expected one of {known}")


def check_inversion(pipe: Any, inversion: Inversion) -> None:
    """Refuse an inversion of another family of models.

    Raises:
        ValueError: says which there are.
    """
    known = FLOW_INVERSIONS if host_of(pipe) == "flux" else INVERSIONS
    if inversion.kind not in known:
        raise ValueError(
            f"a {type(pipe).__name__} is not inverted by {inversion.kind!r}: one of {known} does it"
        )


def make_trajectory(
    pipe: Any,
    reference: Picture | Tensor | None,
    prompt: str,
    sampling: Sampling,
    inversion: Inversion,
    *,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
) -> Trajectory:
    """The latents of a reference at every noise level: inverted from a picture, or sampled from its
    prompt.

    Args:
        reference: a picture, a path, clean latents, or None to make the reference from ``prompt``
            with ``seed``.
        checkpoint: a file from which an interrupted inversion resumes.

    Raises:
        HostUnsupported, ValueError: see :func:`styleattn.inversion.ddim_invert`.
    """

    def report(done: int, total: int) -> None:
        if callback is not None:
            callback(done, total)

    arguments: dict[str, Any] = {
        "num_inference_steps": sampling.num_inference_steps,
        "height": sampling.height,
        "width": sampling.width,
        "callback": report,
    }
    with paused(pipe):
        if host_of(pipe) == "flux":
            arguments["max_sequence_length"] = max_tokens(pipe)
            if reference is None:
                guided = pipe.transformer.config.guidance_embeds
                guidance = sampling.guidance_scale if guided else 1.0
                return flow_sample(pipe, prompt, seed=seed, guidance_scale=guidance, **arguments)
            arguments["checkpoint"] = checkpoint
            return _flow_inverted(pipe, reference, prompt, inversion, seed, arguments)
        if reference is None:
            guidance = sampling.guidance_scale
            return ddim_sample(pipe, prompt, seed=seed, guidance_scale=guidance, **arguments)
        if inversion.kind == "noise":
            del arguments["callback"]
            return noised(pipe, reference, prompt, seed=seed, **arguments)
        arguments.update(guidance_scale=inversion.guidance_scale, checkpoint=checkpoint)
        if inversion.kind == "renoise":
            return renoise_invert(pipe, reference, prompt, **arguments)
        if inversion.kind == "belm":
            return belm_invert(pipe, reference, prompt, **arguments)
        return ddim_invert(pipe, reference, prompt, labels=inversion.labels, **arguments)


def _flow_inverted(
    pipe: Any,
    reference: Picture | Tensor,
    prompt: str,
    inversion: Inversion,
    seed: int,
    arguments: dict[str, Any],
) -> Trajectory:
    """A picture inverted on FLUX; the seed is that of methods that draw noise."""
    check_inversion(pipe, inversion)
    method = {"noise": "noised"}.get(inversion.kind, inversion.kind)
    drawn = method in ("noised", "rf_inversion")
    return flow_invert(
        pipe,
        reference,
        prompt,
        method=method,
        guidance_scale=inversion.guidance_scale,
        seed=seed if drawn else None,
        **arguments,
    )


def make_bank(
    pipe: Any,
    trajectories: Trajectory | Sequence[Trajectory],
    method: Any = TRANSFER,
    *,
    weights: Sequence[float] | None = None,
    offset: int | None = None,
    negative_prompt: str | None = None,
) -> StyleBank:
    """A bank of one or several ready trajectories, all of one length.

    Args:
        weights: one per trajectory; None for 1.
        offset: as in :class:`Inversion`.
        negative_prompt: of the references' unconditional rows; that of the images.

    Raises:
        ValueError: trajectories of different lengths or sizes, or of another scheduler.
    """
    found = [trajectories] if isinstance(trajectories, Trajectory) else list(trajectories)
    weights = [1.0] * len(found) if weights is None else weights
    references = [
        Reference(latents=t, prompt=t.prompt, weight=w) for t, w in zip(found, weights, strict=True)
    ]
    return build_bank(
        pipe,
        references,
        method,
        num_inference_steps=len(found[0]),
        offset=offset,
        negative_prompt=negative_prompt,
        max_sequence_length=max_tokens(pipe) if host_of(pipe) == "flux" else None,
    )


def transfer(
    pipe: Any,
    reference: Picture | Tensor | Trajectory | StyleBank | None,
    prompts: Sequence[str],
    *,
    reference_prompt: str = "",
    method: Any = TRANSFER,
    sampling: Sampling = Sampling(),
    inversion: Inversion = Inversion(),
    seed: int = 0,
    batch_size: int = 4,
    backend: str | None = None,
    callback: Callback | None = None,
    control: Sequence[Any] | None = None,
    **arguments: Any,
) -> list[Image.Image]:
    """Images of ``prompts`` in the style of one reference.

    Args:
        pipe: a Stable Diffusion 1, 2 or XL pipeline, or its ControlNet variant.
        reference: a picture, a path, clean latents, a trajectory or a bank; None makes it from
            ``reference_prompt``.
        reference_prompt: what the reference shows.
        method: what is shared; ``TRANSFER`` is the paper's setting.
        seed: image i is drawn from ``seed + i``.
        batch_size: images per pipeline call; each call also carries the reference.
        callback: called with (steps done, steps of this call).
        control: one control picture per prompt. The ControlNet does not act on the reference
            (:func:`controlled`: it does).
        arguments: of the pipeline call, such as ``controlnet_conditioning_scale``.

    Raises:
        HostUnsupported, ValueError: inputs without meaning.

    Source: StyleAligned (arXiv 2312.02133).
    """
    runs = batches(len(prompts), batch_size)
    _check_control(prompts, control)
    if isinstance(reference, StyleBank):
        bank = reference
    else:
        if not isinstance(reference, Trajectory):
            reference = make_trajectory(
                pipe, reference, reference_prompt, sampling, inversion, seed=seed
            )
        bank = make_bank(
            pipe,
            reference,
            method,
            offset=inversion.offset,
            negative_prompt=sampling.negative_prompt,
        )
    images = []
    with apply(pipe, method, bank=bank, backend=backend):
        for run in runs:
            extra = {} if control is None else {"image": [control[i] for i in run]}
            images += generate(
                pipe,
                [prompts[i] for i in run],
                [seed + i for i in run],
                sampling,
                callback=callback,
                **extra,
                **arguments,
            )
    return images


def controlled(
    pipe: Any,
    trajectory: Trajectory,
    reference_control: Any,
    prompts: Sequence[str],
    control: Sequence[Any],
    *,
    method: StyleAligned | None = None,
    sampling: Sampling = Sampling(guidance_scale=5.0),
    offset: int = 0,
    seed: int = 0,
    batch_size: int = 4,
    backend: str | None = None,
    callback: Callback | None = None,
    **arguments: Any,
) -> list[Image.Image]:
    """Images under a ControlNet that acts on the reference too, with a control picture of its own.

    The reference is row 0 of every batch and is put back on its trajectory after every step.

    Args:
        pipe: a ControlNet pipeline of the Stable Diffusion 1, 2 or XL family with a DDIM scheduler.
        trajectory: of the reference (:func:`make_trajectory`).
        reference_control, control: control pictures, of the reference and one per prompt.
        method: None for ``StyleAligned(control_reference=True)``.
        offset: as in :class:`Inversion`.
        sampling, seed, batch_size, backend, callback, arguments: as in :func:`transfer`.

    Raises:
        HostUnsupported, ValueError: inputs without meaning.

    Source: Control-Style-Aligned-Generation (the repository of that name), after StyleAligned,
        arXiv 2312.02133.
    """
    _check_control(prompts, control)
    if pipe.scheduler.init_noise_sigma != 1.0:
        name = type(pipe.scheduler).__name__
        raise ValueError(
            f"controlled: {name} scales its latents, a reference in the batch needs DDIM"
        )
    shape = tuple(trajectory.latents.shape[1:])
    keep = reference_callback(trajectory, offset=offset)
    images = []
    with apply(pipe, method or StyleAligned(control_reference=True), backend=backend):
        for run in batches(len(prompts), batch_size):
            seeds = [seed, *(seed + i for i in run)]
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
            images += generate(
                pipe,
                [trajectory.prompt, *(prompts[i] for i in run)],
                seeds,
                sampling,
                callback=callback,
                latents=keep.initial(torch.stack(noise).to(pipe.unet.dtype)),
                image=[reference_control, *(control[i] for i in run)],
                callback_on_step_end=keep,
                **arguments,
            )[1:]
    return images


def _check_control(prompts: Sequence[str], control: Sequence[Any] | None) -> None:
    if not prompts:
        raise ValueError("no prompts")
    if control is not None and len(control) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts need as many control pictures, got {len(control)}"
        )
