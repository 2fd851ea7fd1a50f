"""Row maps and masks that live on the host, on the device: copied once per content.

A call whose small tensors are there already copies nothing from the host: once warm, it can be
captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.lru_cache(maxsize=1024)
def _kept(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).to(device)


def on_device(x: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Integers or booleans [N] on a device. The result is shared: it is not to be written to."""
    if torch.compiler.is_compiling() or device.type == "cpu":
        return x.to(device) if isinstance(x, Tensor) else torch.tensor(x, device=device)
    if isinstance(x, Tensor):
        return _kept(tuple(x.tolist()), x.dtype, device) if x.device.type == "cpu" else x.to(device)
    boolean = bool(x) and isinstance(x[0], bool)
    return _kept(tuple(x), torch.bool if boolean else torch.int64, device)
