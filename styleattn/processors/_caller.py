"""Who calls the denoiser: the layout of the batch, where the run is, and how it is known."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from styleattn.references import Reference

_DEPTH = 48
_OWNERS = ("self", "components")


@dataclass(frozen=True)
class Caller:
    """What the host says about one denoiser call.

    Args:
        chunks: how many copies of the batch guidance made: 1, [uncond, cond] 2, with a perturbed
            one 3.
        images_per_prompt: rows that each prompt takes.
        unconditional: per chunk, whether it is the unconditional one.
        timesteps: the run's noise levels, descending; None where unknown.
        references: rows of each chunk that are references, where the caller names them.
    """

    chunks: int
    images_per_prompt: int
    unconditional: tuple[bool, ...]
    timesteps: Tensor | None
    references: tuple[int, ...] | None = None


def unwrapped(model: Any) -> Any:
    """The module behind `torch.compile`."""
    return getattr(model, "_orig_mod", model)


@torch.compiler.disable
def running(model: torch.nn.Module, component: str) -> tuple[Any, bool, Mapping[str, Any]] | None:
    """The pipeline, or the modular pipeline's components, whose call is running this denoiser;
    whether it is modular; and the call's variables. None when there is none.

    Two pipelines may share a denoiser (`from_pipe`), and a pipeline knows its guidance only while
    it runs: so the one that is running is looked up on the stack, by type, not guessed from
    tensors.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            return None
        if any(name in frame.f_code.co_varnames for name in _OWNERS):
            scope = frame.f_locals
            for name in _OWNERS:
                owner = scope.get(name)
                if (
                    owner is not None
                    and not isinstance(owner, torch.nn.Module)
                    and _runs(owner, model, component)
                ):
                    return owner, name == "components", scope
        frame = frame.f_back
    return None


def from_stack(model: torch.nn.Module) -> Caller | None:
    """What the pipeline says whose call is running this UNet; None when there is none."""
    found = running(model, "unet")
    if found is None:
        return None
    owner, modular, scope = found
    return from_modular(owner) if modular else from_pipe(owner, scope)


def _runs(owner: Any, model: torch.nn.Module, component: str) -> bool:
    parts = getattr(owner, "__dict__", {})
    known = unwrapped(parts.get(component)) is model
    return known and getattr(owner, "scheduler", None) is not None


def from_pipe(pipe: Any, scope: Mapping[str, Any] | None = None) -> Caller:
    """What a classic pipeline says.

    Raises:
        RuntimeError: it has not said yet whether it guides (it is not running).
    """
    scope = scope or {}
    guided = scope.get("do_classifier_free_guidance")
    if guided is None:
        try:
            guided = pipe.do_classifier_free_guidance
        except AttributeError:
            guided = None
    if guided is None:
        raise RuntimeError(
            f"styleattn: {type(pipe).__name__} is not running, so the guidance layout of this UNet"
            " call is unknown;"
            " call the UNet within `with handle.layout(chunks=...)`"
        )
    uncond = [True] if guided else []
    unconditional: tuple[bool, ...]
    if guided and "InstructPix2Pix" in type(pipe).__name__:
        unconditional = (False, True, True)
    elif getattr(pipe, "do_perturbed_attention_guidance", False):
        unconditional = (*uncond, False, False)
    else:
        unconditional = (*uncond, False)
    images = scope.get("num_images_per_prompt")
    images = images if isinstance(images, int) and images > 0 else 1
    return Caller(
        len(unconditional), images, unconditional, getattr(pipe.scheduler, "timesteps", None)
    )


def _from_traced(pipe: Any, model: Any) -> Caller | None:
    """`from_pipe` under a compiler: without `pipe.unet`, which holds the very module being
    traced."""
    scale = getattr(pipe, "_guidance_scale", None)
    if scale is None:
        return None
    guided = scale > 1 and model.config.time_cond_proj_dim is None
    perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
    unconditional = (*([True] if guided else []), False, *([False] if perturbed else []))
    return Caller(len(unconditional), 1, unconditional, pipe.scheduler.timesteps)


def from_modular(components: Any) -> Caller:
    """What a modular pipeline says: its guider calls the denoiser once per condition."""
    guider = getattr(components, "guider", None)
    unconditional = guider is not None and guider._enabled and not guider.is_conditional
    return Caller(1, 1, (unconditional,), getattr(components.scheduler, "timesteps", None))


def from_layout(
    chunks: int, timesteps: Tensor | None = None, references: tuple[int, ...] | None = None
) -> Caller:
    """What the user says, for calls outside a pipeline.

    Raises:
        ValueError: chunks is not a positive number.
    """
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"layout: chunks must be a positive int, got {chunks!r}")
    if timesteps is not None and (not isinstance(timesteps, Tensor) or timesteps.ndim != 1):
        raise ValueError("layout: timesteps must be a tensor [N]")
    unconditional = (chunks > 1, *(False for _ in range(chunks - 1)))
    return Caller(chunks, 1, unconditional, timesteps, references)


def find(model: torch.nn.Module, explicit: Caller | None, pipe: weakref.ref[Any] | None) -> Caller:
    """The layout of the running call: the user's word, else the running pipeline's.

    Under `torch.compile` the stack is not there to look at, and the pipeline that was styled is
    asked.

    Raises:
        RuntimeError: nobody knows.
    """
    if explicit is not None:
        return explicit
    if torch.compiler.is_compiling():
        owner = None if pipe is None else pipe()
        found = None if owner is None else _from_traced(owner, model)
    else:
        found = from_stack(model)
    if found is None:
        raise RuntimeError(
            "styleattn: the UNet was called outside a diffusers pipeline, so the guidance layout"
            " of its batch is"
            " unknown; call it within `with handle.layout(chunks=...)` (2 for [uncond, cond]), or"
            " within"
            " `with handle.paused()` to leave the style out"
        )
    return found


def step_of(timestep: Any, timesteps: Tensor) -> int:
    """The position of a timestep in the run's noise levels, without a device synchronisation where
    it is a view of
    them (as in a pipeline's loop)."""
    if isinstance(timestep, Tensor) and timestep.numel() and timestep.dtype == timesteps.dtype:
        size = timesteps.element_size()
        offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), size)
        if timestep.device == timesteps.device and not rest and 0 <= offset < len(timesteps):
            return offset
    value = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
    return min(int((timesteps > value).sum()), len(timesteps) - 1)


def fraction_of(timestep: Any, timesteps: Tensor) -> Tensor:
    """The same as a fraction of the run, as a 0-dim tensor on its device: traceable."""
    value = torch.as_tensor(timestep, device=timesteps.device).reshape(-1)[:1]
    step = (timesteps > value).sum().clamp(max=len(timesteps) - 1)
    return step.to(torch.float32) / len(timesteps)


def unseen(methods: Sequence[Any], references: Sequence[Sequence[Reference]], prompts: int) -> str:
    """What to say of a reference whose `prompts` are all beyond those of the call; "" if there is
    none, and under a compiler."""
    for method, shown in zip(methods, references, strict=True):
        for index, reference in enumerate(shown):
            wanted = reference.prompts
            if torch.compiler.is_compiling() or not wanted or min(wanted) < prompts:
                continue
            return (
                f"references[{index}] of {method.name} is for prompts {wanted}, counted from 0, and"
                f" the call has {prompts}: none sees it"
            )
    return ""
