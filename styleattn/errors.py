"""The error of a call without meaning, and the words for tensors in messages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Invalid(ValueError):
    """A call that has no meaning. Its message names the call, every reason, and the shapes."""

    reasons: tuple[str, ...] = ()


def invalid(call: str, reasons: Sequence[str], inputs: str) -> Invalid:
    """The error of a call, with all its reasons."""
    lines = "".join(f"\n    {reason}" for reason in reasons)
    error = Invalid(f"{call}:{lines}\n  inputs: {inputs}")
    error.reasons = tuple(reasons)
    return error


def describe(tensor: object) -> str:
    """``[2, 8, 77, 64] float32 cpu`` for a tensor, the type's name for anything else."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}"
