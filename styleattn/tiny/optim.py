"""Muon: momentum whose update is made orthogonal (Jordan et al., 2024, "Muon: an optimizer for
hidden layers in neural networks")."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def orthogonalized(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Roughly `U V^T` of the singular value decomposition of a matrix, by a quintic Newton-Schulz
    iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; a convolution counts as a matrix [out, in * height *
    width]."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                mean = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(mean, group["momentum"]).flatten(1)
                update = orthogonalized(update) * max(1, update.shape[0] / update.shape[1]) ** 0.5
                parameter.add_(update.view(parameter.shape), alpha=-group["lr"])
