"""The mathematics of DDIM in both directions: no host, no diffusers, only a noise function.

A latent of noise level ᾱ is ``x = √ᾱ·x0 + √(1-ᾱ)·ε``; a DDIM move keeps x0 and ε and changes the
level:

    x' = √ᾱ'·(x - √(1-ᾱ)·ε)/√ᾱ + √(1-ᾱ')·ε

Sampling moves to less noise, inversion to more, with the same formula.

Source: arXiv 2010.02502, eq. 12 and section 4.3; the labelling of the inversion is that of
    StyleAligned, arXiv 2312.02133.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Epsilon = Callable[[Tensor, int], Tensor]
LABELS = ("paper", "consistent", "style_id")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
MIN_ALPHA = (
    2.0**-24
)  # schedules with zero terminal signal end here, so that x0 = (x - √(1-ᾱ)·ε)/√ᾱ stays defined


@dataclass(frozen=True)
class Move:
    """One DDIM move: ask the model at ``label``, go from level ``source`` to level ``target`` (both
    ᾱ)."""

    label: int
    source: float
    target: float


def to_epsilon(output: Tensor, x: Tensor, alpha: float, prediction_type: str) -> Tensor:
    """Turn a network's output at level ``alpha`` into the noise that it stands for.

    epsilon: ε = output;  sample: ε = (x - √ᾱ·output)/√(1-ᾱ);  v_prediction: ε = √ᾱ·output +
        √(1-ᾱ)·x.

    Args:
        output, x: tensors of one shape.
        alpha: ᾱ of the timestep that the network was asked at.
        prediction_type: one of ``PREDICTION_TYPES``.

    Raises:
        ValueError: unknown prediction type, or "sample" at ᾱ = 1, where no noise is left to find.
    """
    if prediction_type == "epsilon":
        return output
    signal, noise = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    if prediction_type == "v_prediction":
        return signal * output + noise * x
    if prediction_type == "sample":
        if noise == 0.0:
            raise ValueError(
                "a 'sample' prediction at alpha_cumprod = 1 says nothing about the noise"
            )
        return (x - signal * output) / noise
    raise ValueError(
        f"unknown prediction_type {prediction_type!r}: expected one of {PREDICTION_TYPES}"
    )


def move(x: Tensor, epsilon: Tensor, source: float, target: float) -> Tensor:
    """The DDIM move from level ``source`` to level ``target`` (the formula of this module), in the
    dtype of ``x``."""
    clean = (x - math.sqrt(1.0 - source) * epsilon) / math.sqrt(source)
    return math.sqrt(target) * clean + math.sqrt(1.0 - target) * epsilon


def levels(
    timesteps: Sequence[int], alphas_cumprod: Sequence[float], final_alpha: float
) -> list[float]:
    """ᾱ of every latent of a trajectory: one for each timestep, in their order, then
    ``final_alpha`` for the data."""
    return [max(float(alphas_cumprod[t]), MIN_ALPHA) for t in timesteps] + [float(final_alpha)]


def inversion_plan(
    timesteps: Sequence[int],
    alphas_cumprod: Sequence[float],
    final_alpha: float,
    labels: str = "paper",
) -> list[Move]:
    """The moves from data to noise.

    The move that ends at the level of timestep t starts at the level of the timestep before it
    (``final_alpha`` for the first). With labels "paper" the model is asked at t, one step noisier
    than the latent that it sees; with "consistent" it is asked at the timestep whose level the
    latent has. With "style_id" every latent counts as having the level of the timestep that the
    model is asked at, the data that of the first, and the last move ends at the noise schedule's
    very end, as StyleID's code does it (arXiv 2312.09008).

    Args:
        timesteps: ascending integers.
        alphas_cumprod: ᾱ of every training timestep.
        final_alpha: ᾱ that counts as data: 1, or ᾱ_0 where the scheduler says
            ``set_alpha_to_one=False``.

    Raises:
        ValueError: no timesteps, timesteps that do not ascend or that the schedule lacks, or
            unknown labels.
    """
    if labels not in LABELS:
        raise ValueError(f"unknown labels {labels!r}: expected one of {LABELS}")
    order = [int(t) for t in timesteps]
    if not order or any(a >= b for a, b in itertools.pairwise(order)):
        raise ValueError(f"timesteps must ascend strictly, got {order}")
    if order[0] < 0 or order[-1] >= len(alphas_cumprod):
        raise ValueError(
            f"timesteps must lie in 0..{len(alphas_cumprod) - 1}, got {order[0]}..{order[-1]}"
        )
    alphas = levels(order, alphas_cumprod, final_alpha)
    if labels == "style_id":
        ends = [*alphas[1:-1], max(float(alphas_cumprod[-1]), MIN_ALPHA)]
        return [Move(*parts) for parts in zip(order, alphas[:-1], ends, strict=True)]
    sources = [float(final_alpha), *alphas[:-2]]
    seen = order if labels == "paper" else [0, *order[:-1]]
    return [Move(*parts) for parts in zip(seen, sources, alphas[:-1], strict=True)]


def sampling_plan(
    timesteps: Sequence[int], alphas_cumprod: Sequence[float], final_alpha: float
) -> list[Move]:
    """The moves from noise to data over descending ``timesteps``; the model is asked at the level
    that it sees."""
    order = [int(t) for t in timesteps]
    alphas = levels(order, alphas_cumprod, final_alpha)
    return [Move(*parts) for parts in zip(order, alphas[:-1], alphas[1:], strict=True)]


def run(x: Tensor, plan: Sequence[Move], epsilon: Epsilon) -> Iterator[Tensor]:
    """Carry ``x`` through ``plan`` and yield the latent after every move.

    Args:
        x: the starting latent, any shape; the moves are done in its dtype (use fp32).
        plan: of :func:`inversion_plan` or :func:`sampling_plan`.
        epsilon: (x, timestep) -> ε, of the shape of x.
    """
    for step in plan:
        x = move(x, epsilon(x, step.label).to(x.dtype), step.source, step.target)
        yield x


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ over all elements, in fp64 (the plain norm where ``expected``
    is zero)."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / (torch.linalg.vector_norm(expected.double()) or 1.0))
