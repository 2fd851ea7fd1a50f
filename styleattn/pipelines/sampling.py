"""How pictures are sampled: one call of a pipeline as it stands, a prompt and a seed for every
picture."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .hosts import call_arguments

Callback = Callable[[int, int], object]


@dataclass(frozen=True)
class Sampling:
    """How images are sampled: the arguments of a pipeline call that hold for all prompts.

    Args:
        num_inference_steps, guidance_scale, negative_prompt: as in diffusers; on FLUX the guidance
            scale is the embedded one.
        height, width: pixels; None is the pipeline's own size.
        true_guidance: FLUX's classifier-free guidance by a second call, against the negative
            prompt; 1 is none.

    Raises:
        ValueError: no steps, or a guidance scale that is no number.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 10.0
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    true_guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1, got {self.num_inference_steps}"
            )
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be finite and >= 0, got {self.guidance_scale}")
        if not 1 <= self.true_guidance < float("inf"):
            raise ValueError(f"true_guidance must be finite and >= 1, got {self.true_guidance}")


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    callback: Callback | None = None,
    **arguments: Any,
) -> list[Image.Image]:
    """One batch through the pipeline as it stands: a prompt and a seed for every image.

    Every image has a generator of its own on the CPU, and every prompt is embedded alone, so that
    an image is determined by its prompt and seed; its neighbours in the batch touch it only through
    the rounding of the libraries below.

    Args:
        arguments: further arguments of the pipeline call (a ControlNet's ``image``, for example).

    Raises:
        TypeError: arguments that the pipeline's call does not have.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise TypeError(f"{type(pipe).__name__} takes no argument {', '.join(unknown)}")
    words = call_arguments(pipe, prompts, sampling)
    steps = sampling.num_inference_steps
    inner = arguments.pop("callback_on_step_end", None)

    def step_end(host: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if callback is not None:
            callback(step + 1, steps)
        return tensors if inner is None else inner(host, step, t, tensors)

    with _quiet(pipe), torch.no_grad():
        return pipe(
            **words,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            height=sampling.height,
            width=sampling.width,
            callback_on_step_end=step_end,
            **arguments,
        ).images


def batches(count: int, size: int) -> list[range]:
    """The indices 0..count-1 in runs of ``size``.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own, and afterwards the one that was there."""
    before: Mapping[str, Any] | None = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))
