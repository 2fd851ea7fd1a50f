"""A problem with tensors, its exact result on a sample of queries, and its error budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from formulations import FORMULATIONS, Attention, Tensors
from shapes import Problem
from torch import Tensor

SAMPLES = 32
"""Queries of every row and head whose result is checked."""


def attend(call: Attention, samples: Tensor) -> Tensor:
    """One softmax for some queries, every intermediate in the tensors' dtype: [B, H, samples, D].

    Rows are taken one after the other: a whole batch of fp64 logits need not fit.
    """
    bias = call.bias(samples)
    outs = []
    for q, k, v in zip(call.query[:, :, samples], call.key, call.value, strict=True):
        logits = q @ k.transpose(-1, -2) * call.scale
        if bias is not None:
            logits = logits + bias[0]
        outs.append(logits.softmax(-1) @ v)
    return call.weight * torch.stack(outs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over root-mean-square value; infinite where something is not
    finite."""
    difference = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(difference) if math.isfinite(difference) else math.inf


@dataclass(frozen=True)
class Case:
    """A problem with tensors: drawn from the seed, rounded to the dtype, on the device."""

    problem: Problem
    dtype: torch.dtype
    tensors: Tensors

    @classmethod
    def draw(
        cls, problem: Problem, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        tensors = FORMULATIONS[problem.kind].inputs(problem, generator)
        return cls(problem, dtype, {n: x.to(device, dtype) for n, x in tensors.items()})

    @property
    def device(self) -> torch.device:
        return self.tensors["query"].device

    def ours(self, backend: str | None) -> Tensor:
        """Through the public functions."""
        out = FORMULATIONS[self.problem.kind].ours(self.problem, self.tensors, backend)
        assert isinstance(out, Tensor)
        return out

    def official(self) -> Tensor:
        """As the method's own code computes it."""
        return FORMULATIONS[self.problem.kind].official(self.problem, self.tensors)

    def materialised(self, dtype: torch.dtype | None = None) -> list[Attention]:
        """The attentions whose weighted sum is the result, computed in a dtype (the inputs')."""
        tensors = {n: x.to(dtype or self.dtype) for n, x in self.tensors.items()}
        return FORMULATIONS[self.problem.kind].materialised(self.problem, tensors)

    @cached_property
    def samples(self) -> Tensor:
        """The queries that are checked, spread over the length."""
        count = min(SAMPLES, self.problem.length)
        return torch.linspace(0, self.problem.length - 1, count, device=self.device).long()

    def _sampled(self, dtype: torch.dtype) -> Tensor:
        total = sum(attend(call, self.samples) for call in self.materialised(dtype))
        assert isinstance(total, Tensor)
        return total

    @cached_property
    def exact(self) -> Tensor:
        """The result of the sampled queries in fp64, from the rounded inputs."""
        return self._sampled(torch.float64)

    @cached_property
    def budget(self) -> float:
        """Twice what eager PyTorch and one rounding of the exact result lose in the dtype."""
        eager = relative_error(self._sampled(self.dtype), self.exact)
        return 2 * (eager + relative_error(self.exact.to(self.dtype), self.exact))

    def error(self, out: Tensor) -> float:
        """The relative error of a result [B, H, L, D] at the sampled queries.

        Raises:
            ValueError: wrong shape or dtype.
        """
        if out.shape != self.tensors["query"].shape or out.dtype != self.dtype:
            raise ValueError(f"the result is {list(out.shape)} {out.dtype}")
        return relative_error(out[:, :, self.samples], self.exact)
