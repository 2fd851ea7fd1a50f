"""The kernels run in Triton's interpreter where there is no GPU, mended for bfloat16."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is defined

import numpy as np
from triton.runtime import interpreter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A process runs the kernels either in the interpreter or on the GPU."""
    compiled = os.environ.get("TRITON_INTERPRET") != "1"
    for item in items:
        if "kernels" in item.path.parts and item.path.name not in ("test_compile.py",):
            on_gpu = item.get_closest_marker("gpu") is not None
            if compiled != on_gpu:
                where = "a GPU, without TRITON_INTERPRET" if on_gpu else "TRITON_INTERPRET=1"
                item.add_marker(pytest.mark.skip(reason=f"needs {where}"))


_BUILDER = interpreter.InterpreterBuilder
_dot, _truncate = _BUILDER.create_dot, _BUILDER.create_fp_trunc


def _widened(operand):
    """A bfloat16 operand as float32; the interpreter keeps bfloat16 as raw 16-bit integers."""
    if not operand.dtype.scalar.is_bf16():
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)


def _multiply(self, a, b, d, precision, imprecise):
    """tl.dot, which Triton 3.6 and 3.7 apply to the raw bits."""
    return _dot(self, _widened(a), _widened(b), d, precision, imprecise)


def _round(self, source, target):
    """float32 to bfloat16, to nearest even as the hardware does; Triton's interpreter truncates."""
    if not (target.scalar.is_bf16() and source.dtype.scalar.is_fp32()):
        return _truncate(self, source, target)
    bits = np.ascontiguousarray(source.data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(source.data), 0x7FC0, rounded)
    return interpreter.TensorHandle(rounded.astype(np.uint16), target.scalar)


_BUILDER.create_dot = _multiply
_BUILDER.create_fp_trunc = _round
