"""A kernel with its arguments, ready to start."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it needs to start, and what has to run before it."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    before: tuple[Launch, ...] = ()

    def run(self, device: torch.device) -> None:
        """Start it on the current stream of the tensors' device."""
        for launch in self.before:
            launch.run(device)
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](*self.args, **self.constants, **self.options)
