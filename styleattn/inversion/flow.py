"""The mathematics of rectified flow in both directions: no host, only a velocity function.

A latent of noise level s is ``x = (1 - s)·x0 + s·ε``, and the network gives the velocity
``v = dx/ds``, which for one pair of data and noise is ``ε - x0``. Sampling goes from s = 1 to
s = 0, inversion from 0 to 1, with the same formulas.

Source: Liu et al., Flow Straight and Fast, arXiv 2209.03003; the solvers at their functions.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""(x, s) -> v of the shape of x."""

METHODS = ("euler", "rf_solver", "rf_inversion", "noised")


def noised(clean: Tensor, noise: Tensor, level: float) -> Tensor:
    """x = (1 - s)·x0 + s·ε."""
    return (1.0 - level) * clean + level * noise


def euler(x: Tensor, velocity: Velocity, source: float, target: float) -> Tensor:
    """One step of first order: x' = x + (s' - s)·v(x, s)."""
    return x + (target - source) * velocity(x, source).to(x.dtype)


def rf_solver(x: Tensor, velocity: Velocity, source: float, target: float) -> Tensor:
    """One step of second order, the derivative of v by half a step.

        x' = x + h·v + h²/2·v',    v' = (v_half - v)/(h/2),    h = s' - s
        v_half = v(x + h/2·v, s + h/2)

    which is x' = x + h·v_half: what is computed. Two calls of the network.

    Source: Wang et al., Taming Rectified Flow for Inversion and Editing, arXiv 2411.04746.
    """
    half = (source + target) / 2
    middle = euler(x, velocity, source, half)
    return x + (target - source) * velocity(middle, half).to(x.dtype)


def towards_noise(
    x: Tensor, velocity: Velocity, source: float, target: float, noise: Tensor, gamma: float
) -> Tensor:
    """One Euler step of the controlled forward equation: the velocity drawn towards that which
    ends at a given noise.

        v' = v(x, s) + γ·((ε - x)/(1 - s) - v(x, s))

    Args:
        source: less than 1. gamma: γ, 0 follows the network, 1 leads straight to the noise.

    Source: Rout et al., Semantic Image Inversion and Editing using Rectified Stochastic
        Differential Equations, arXiv 2410.10792, eq. 8 and algorithm 1.
    """
    v = velocity(x, source).to(x.dtype)
    v = v + gamma * ((noise - x) / (1.0 - source) - v)
    return x + (target - source) * v


def towards_data(
    x: Tensor, velocity: Velocity, source: float, target: float, clean: Tensor, eta: float
) -> Tensor:
    """One Euler step of the controlled reverse equation: the velocity drawn towards that which
    ends at given data.

        v' = v(x, s) + η·((x - x0)/s - v(x, s))

    Args:
        source: greater than 0. eta: η, 0 follows the network, 1 leads straight to the data.

    Source: as :func:`towards_noise`, algorithm 2.
    """
    v = velocity(x, source).to(x.dtype)
    v = v + eta * ((x - clean) / source - v)
    return x + (target - source) * v
