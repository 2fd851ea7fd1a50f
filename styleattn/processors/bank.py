"""Banks: references made ready once, and the callback that transfers a picture without one."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from styleattn.inversion import Trajectory, ddim_invert, ddim_sample, encode_prompts, fingerprint
from styleattn.inversion.flow_host import is_flow, packed
from styleattn.inversion.host import check_host, time_ids, timesteps_of
from styleattn.methods import METHODS, JointMethod, Method
from styleattn.references import VERSION, Reference, StyleBank

from . import paused
from ._flux_bank import FluxPictures
from ._layers import layer_weights
from .unet import self_attention_layers

STEPS, PICTURE_GUIDANCE, SAMPLE_GUIDANCE = 50, 2.0, 5.0
PAPER_OFFSET = 5


def build_bank(
    pipe: Any,
    references: Reference | Sequence[Reference],
    method: Method | JointMethod,
    *,
    num_inference_steps: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    offset: int | None = None,
    labels: str | None = None,
    inversion: str | None = None,
    max_sequence_length: int | None = None,
    callback: Callable[[int, int], bool | None] | None = None,
) -> StyleBank:
    """Make references ready for any number of prompts: invert pictures, or sample prompts, and keep
    the latents.

    Args:
        pipe: a Stable Diffusion 1, 2 or XL, or a FLUX.1 pipeline; a style on it rests meanwhile.
        references: pictures (`image`, or clean `latents`, or a ready `Trajectory` as `latents`),
            or just prompts, which are sampled.
        method: what the bank is for; part of its fingerprint.
        num_inference_steps: of the inversion; use the same number in the pipeline call. None for
            50, on FLUX 28.
        seed: of sampled references, and of inversions that draw noise; reference i has seed + i.
        guidance_scale: of the inversion or the sampling; None for 2 and 5, on FLUX for 1 and 3.5.
        negative_prompt: of the references' unconditional rows.
        height, width: pixels; the pipeline's own size if None.
        offset: see `StyleBank`; None for 5, as StyleAligned transfers, when every reference is a
            picture inverted with the paper's labels, else 0.
        labels: of DDIM's inversion, "paper" or "consistent"; None for "paper". FLUX has none.
        inversion: on FLUX the `method` of `styleattn.inversion.flow_invert`, None for "rf_solver".
            Other hosts invert with DDIM; give another inversion's `Trajectory` as `latents`.
        max_sequence_length: on FLUX the tokens of T5, as in the pipeline call; None for 512.
        callback: called with (steps done, all steps) of each reference; returning False stops.

    Raises:
        TypeError: a pipeline or a reference that is not supported.
        ValueError: layers that the model does not have; pictures, sizes or trajectories that do not
            fit together; knobs of another host.

    Source: Hertz et al., StyleAligned, arXiv 2312.02133, transfer from a real image.
    """
    host = _host(pipe, labels, inversion, max_sequence_length)
    chosen = (references,) if isinstance(references, Reference) else tuple(references)
    if not chosen or not all(isinstance(r, Reference) for r in chosen):
        raise TypeError("build_bank takes one Reference or several")
    if isinstance(method, type) or not host.serves(method):
        names = ", ".join(name for name, each in METHODS.items() if host.serves(each))
        raise TypeError(f"build_bank needs a method to make the bank for: {names}")
    for reference in chosen:  # what `apply` would refuse is refused before the work
        layer_weights(reference.layers, host.layers())
    options: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "height": height,
        "width": width,
        "callback": callback,
    }
    with paused(pipe):
        trajectories = [
            host.trajectory(r, seed + i, guidance_scale, options) for i, r in enumerate(chosen)
        ]
    first = trajectories[0]
    _check_alike(trajectories)
    if offset is None:
        offset = host.offset(trajectories)
    prompts = [r.prompt or t.prompt for r, t in zip(chosen, trajectories, strict=True)]
    told = host.conditions(prompts, negative_prompt, first)
    conditions = {n: x.detach().cpu().contiguous() for n, x in told.items() if x is not None}
    kept = tuple(
        replace(r, image=None, latents=None, prompt=p) for r, p in zip(chosen, prompts, strict=True)
    )
    facts = {
        "method": method.to_dict(),
        "scheduler": type(pipe.scheduler).__name__,
        "height": first.height,
        "width": first.width,
        "labels": [t.labels for t in trajectories],
        "guidance_scale": [t.guidance_scale for t in trajectories],
        "negative_prompt": negative_prompt,
        "dtype": str(host.model.dtype),
        **host.facts(),
    }
    latents = torch.stack([t.latents for t in trajectories])
    bank = StyleBank(latents, first.timesteps, conditions, kept, offset, "", facts)
    return replace(bank, fingerprint=_fingerprint(bank))


def _check_alike(trajectories: Sequence[Trajectory]) -> None:
    """The references of a bank have the same timesteps and the same size."""
    found = [(t.timesteps.tolist(), list(t.latents.shape[1:])) for t in trajectories]
    for i, (steps, shape) in enumerate(found):
        if (steps, shape) != found[0]:
            raise ValueError(
                f"the references of a bank share timesteps and size; reference {i} has"
                f" {len(steps)} steps of {shape}, reference 0 {len(found[0][0])} of {found[0][1]}"
            )


class UNetPictures:
    """Trajectories and conditions of references on a pipeline with a UNet.

    Args:
        labels: of DDIM's inversion; None for the paper's.
    """

    def __init__(self, pipe: Any, labels: str | None):
        check_host(pipe, "build_bank")
        self.pipe, self.model, self.labels = pipe, pipe.unet, labels or "paper"

    @staticmethod
    def serves(method: Any) -> bool:
        """Whether a bank is of use for a method."""
        return isinstance(method, Method)

    def layers(self) -> Sequence[str]:
        """Names of the layers that a reference may choose from."""
        return list(self_attention_layers(self.model))

    def trajectory(
        self, reference: Reference, seed: int, guidance_scale: float | None, options: dict[str, Any]
    ) -> Trajectory:
        """A given one, an inverted picture, or a sampled prompt.

        Raises:
            ValueError: a trajectory of another schedule.
        """
        given, steps = reference.latents, options["num_inference_steps"]
        if isinstance(given, Trajectory):
            expected = timesteps_of(self.pipe, len(given))
            if expected != given.timesteps.tolist():
                raise ValueError(
                    "the trajectory was made for another scheduler: its timesteps differ"
                )
            return given
        options = {**options, "num_inference_steps": STEPS if steps is None else steps}
        picture = reference.image if given is None else given
        if picture is None:
            scale = SAMPLE_GUIDANCE if guidance_scale is None else guidance_scale
            return ddim_sample(
                self.pipe, reference.prompt, seed=seed, guidance_scale=scale, **options
            )
        scale = PICTURE_GUIDANCE if guidance_scale is None else guidance_scale
        return ddim_invert(
            self.pipe,
            picture,
            reference.prompt,
            guidance_scale=scale,
            labels=self.labels,
            **options,
        )

    def conditions(
        self, prompts: Sequence[str], negative: str | None, trajectory: Trajectory
    ) -> dict[str, Tensor | None]:
        """What the UNet is told for each reference."""
        told = encode_prompts(self.pipe, prompts, negative)
        found = {
            "prompt_embeds": told.embeds,
            "negative_prompt_embeds": told.negative_embeds,
            "text_embeds": told.pooled,
            "negative_text_embeds": told.negative_pooled,
        }
        if told.pooled is not None:
            ids = time_ids(self.pipe, trajectory.height, trajectory.width)
            found["time_ids"] = ids.expand(len(told.embeds), -1)
        return found

    def facts(self) -> dict[str, Any]:
        """What tells the model from others."""
        return {"model": fingerprint(self.model)}

    def offset(self, trajectories: Sequence[Trajectory]) -> int:
        """As StyleAligned transfers, where all are pictures inverted with the paper's labels."""
        as_printed = all(t.method == "ddim" and t.labels == "paper" for t in trajectories)
        return min(PAPER_OFFSET, len(trajectories[0]) - 1) if as_printed else 0


def _host(
    pipe: Any, labels: str | None, inversion: str | None, max_sequence_length: int | None
) -> UNetPictures | FluxPictures:
    """What makes the pipeline's trajectories and conditions.

    Raises:
        ValueError: knobs of another host.
    """
    if is_flow(pipe):
        if labels is not None:
            raise ValueError(f"build_bank: labels are of DDIM, FLUX has none; got {labels!r}")
        return FluxPictures(pipe, inversion, max_sequence_length)
    given = {"inversion": inversion, "max_sequence_length": max_sequence_length}
    named = [f"{name} = {value!r}" for name, value in given.items() if value is not None]
    if named:
        raise ValueError(f"build_bank: {', '.join(named)} is for FLUX pipelines")
    return UNetPictures(pipe, labels)


def _fingerprint(bank: StyleBank) -> str:
    """SHA-256 over everything a bank holds, and what it was made for."""
    facts = [VERSION, bank.offset, [r.to_dict() for r in bank.references], dict(bank.metadata)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    masks = {f"mask.{i}": r.mask for i, r in enumerate(bank.references)}
    tensors = {"latents": bank.latents, "timesteps": bank.timesteps, **bank.conditions, **masks}
    for name, x in sorted(tensors.items()):
        if x is not None:
            digest.update(f"{name}{list(x.shape)}{x.dtype}".encode())
            digest.update(
                x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


class ReferenceCallback:
    """What `reference_callback` returns: a `callback_on_step_end`, and the latents to start
    with."""

    def __init__(self, trajectory: Trajectory, offset: int, row: int):
        self.trajectory, self.offset, self.row = trajectory, offset, row

    def initial(self, latents: Tensor) -> Tensor:
        """The starting latents [n, C, h, w], on FLUX packed [n, S, 4C], with the reference's in
        its row."""
        latents = latents.clone()
        latents[self.row] = self._shown(self.offset, latents)
        return latents

    def _shown(self, index: int, latents: Tensor) -> Tensor:
        """A latent of the trajectory as a row of a pipeline's: of FLUX's packed [n, S, 4C]."""
        found = self.trajectory.latents[index : index + 1].to(latents)
        return packed(found)[0] if latents.ndim == 3 else found[0]

    def __call__(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        latents = callback_kwargs["latents"].clone()
        timesteps = pipe.scheduler.timesteps
        here, scale = len(self.trajectory), 1.0
        if step + 1 < len(timesteps):
            after = timesteps[step + 1]
            seen = max(1, self.trajectory.step_of(float(after)))
            here = self.trajectory.reference_index(seen, self.offset)
            scale = input_scale(pipe.scheduler, after)
        latents[self.row] = self._shown(here, latents) / scale
        return {**callback_kwargs, "latents": latents}


def reference_callback(
    trajectory: Trajectory, *, offset: int = 5, row: int = 0
) -> ReferenceCallback:
    """StyleAligned's own way of transferring a picture: one row of the call is the reference, and
    its latents are put back on their trajectory after every step.

        keep = reference_callback(trajectory)
        pipe([reference_prompt, *prompts], latents=keep.initial(latents), callback_on_step_end=keep)

    For a style applied without a bank; the first picture that comes back is the reference's.

    Args:
        trajectory: the picture's, of `styleattn.inversion.ddim_invert` or, with an offset of 0,
            `flow_invert`.
        offset: step 0 sees z[offset], step i sees z[max(offset + 1, i)].
        row: the reference's row.

    Raises:
        ValueError: an offset outside the trajectory.

    Source: google/style-aligned, inversion.py, make_inversion_callback.
    """
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < len(trajectory):
        raise ValueError(f"offset must be one of 0..{len(trajectory) - 1}, got {offset!r}")
    return ReferenceCallback(trajectory, offset, row)


def input_scale(scheduler: Any, timestep: Tensor) -> float:
    """What the scheduler multiplies latents with before the denoiser sees them; 1 for DDIM and
    flows."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    probe = copy.copy(scheduler)
    for name in ("_step_index", "_begin_index"):
        if hasattr(probe, name):
            setattr(probe, name, None)
    one = torch.ones(1, dtype=torch.float64, device=timestep.device)
    return float(probe.scale_model_input(one, timestep))
