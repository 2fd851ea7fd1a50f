"""Which devices and calls the kernels run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .configs import cuda_arch, hip_arch

if TYPE_CHECKING:
    from torch import Tensor

    from ..branch import Branch

MAX_HEAD_DIM = 256
MAX_SEGMENTS = 64  # segments are unrolled
_GRID_LIMIT = 65535


@triton.jit
def _probe_kernel(a, out):
    i = tl.arange(0, 16)
    x = tl.load(a + i[:, None] * 16 + i[None, :])
    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(x, x))


@functools.cache
def _interpreter_multiplies_bf16() -> bool:
    """Whether the interpreter multiplies bfloat16 (Triton 3.6 and 3.7 multiply the raw bits)."""
    out = torch.empty(16, 16)
    _probe_kernel[(1,)](torch.ones(16, 16, dtype=torch.bfloat16), out)
    return bool((out == 16).all())


def interpreted() -> bool:
    """Whether the kernels of this process run under the Triton interpreter."""
    return not isinstance(_probe_kernel, triton.JITFunction)


def arch_of(query: Tensor) -> str | None:
    """The name in the configuration table of the query's device, None where there is none."""
    if interpreted():
        return "interpreter"
    return _device_arch(query.device) if query.device.type == "cuda" else None


@functools.cache
def _device_arch(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return hip_arch(torch.cuda.get_device_properties(device).gcnArchName)
    return cuda_arch(*torch.cuda.get_device_capability(device))


def reasons(query: Tensor, branches: Sequence[Branch]) -> list[str]:
    """Every reason why the kernels cannot run a normalised call."""
    found = []
    kind = query.device.type
    if kind == "cpu" and not interpreted():
        found.append("CPU tensors need Triton's interpreter: TRITON_INTERPRET=1 before its import")
    elif kind not in ("cpu", "cuda"):
        found.append(f"device is {query.device}, the kernels run on NVIDIA and AMD GPUs")
    elif kind == "cuda" and arch_of(query) is None:
        name = torch.cuda.get_device_name(query.device)
        found.append(f"{name} is neither NVIDIA sm_80 or later nor AMD CDNA 2 or later")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"dtype is {query.dtype}, the kernels take float32, float16 and bfloat16")
    elif query.dtype == torch.bfloat16 and interpreted() and not _interpreter_multiplies_bf16():
        found.append("this Triton's interpreter multiplies bfloat16 wrongly")
    if query.shape[-1] > MAX_HEAD_DIM:
        found.append(f"head_dim is {query.shape[-1]} (at most {MAX_HEAD_DIM})")
    for name, n in (("batch", query.shape[0]), ("heads", query.shape[1])):
        if n > _GRID_LIMIT:
            found.append(f"{name} is {n} (at most {_GRID_LIMIT})")
    count = sum(len(branch.segments) for branch in branches)
    if count > MAX_SEGMENTS:
        found.append(f"{count} segments (at most {MAX_SEGMENTS})")
    return found
