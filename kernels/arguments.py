"""What kernels are given: tuples of pointers and numbers, of which a kernel reads the fields."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Number(NamedTuple):
    """A scalar by value, or a pointer to [B] or [B, L] fp32 (stride_l None: [B])."""

    value: Any
    pointer: Any = None
    stride_b: Any = None
    stride_l: Any = None


class Map(NamedTuple):
    """Pointers to contiguous [B, H, D] fp32: y = scale * x + shift. center may be None."""

    scale: Any
    shift: Any
    center: Any = None


class Rows(NamedTuple):
    """A [B or R, H, tokens, D] tensor: pointer and strides (row, head, token); the last dim is
    contiguous.

    aligned: 1 where all strides are multiples of 8 elements, so that 16 bytes are one load (the
    compiler sees multiples of 16 by itself, and 40 channels per head are none).
    """

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any
    aligned: Any


def rows_of(x: Tensor, *, broadcast: bool = False) -> Rows:
    """A tensor as a kernel's argument; `broadcast`: its first row serves all."""
    strides = (0 if broadcast else x.stride(0), x.stride(1), x.stride(2))
    return Rows(x, *strides, aligned=1 if all(s % 8 == 0 for s in strides) else None)


NO_NUMBER, NO_MAP = Number(None), Map(None, None)
NO_ROWS = Rows(None, None, None, None, None)
"""What is absent: Triton 3.6 compares no tuple that holds a None with None, so that kernels ask for
a field."""


class SegmentArgs(NamedTuple):
    """What a kernel knows about one segment; None, or a tuple of it, is a capability that the
    kernel does without."""

    key: Any
    value: Any
    length: Any
    rows: Any
    key_map: Any
    value_map: Any
    logit_scale: Any
    logit_bias: Any
    key_bias: Any
    key_bias_stride: Any
    single: Any  # 1: one step holds all keys
    signed: Any  # 1: the logit scale may be negative
    reach: Any  # how far the keys reach: the softmax may do without a running maximum
    quantised: Any  # the keys as INT8
    clean: Any  # 1: keys and values that a bias removes are zeros
    settled: Any  # 1: the products with the values are waited for in their turn
    early: Any  # 1: the products of the first of two chunks of keys are issued a turn ahead


class BranchArgs(NamedTuple):
    """What a kernel knows about one branch."""

    query: Any
    content: Any
    gamma: Any
    query_map: Any
    segments: Any
    count: Any  # a 1 for every segment: Triton 3.6 finds no length where there is a None inside
    null_keys: Any
    weight: Any
    park: Any  # Rows of the output: folded queries are put there and read again
    lse: Any  # [B, H, L] fp32, to be filled
    gets: Any  # [B, H, L, D] fp32: the sum of the branches before, where no register holds it
    puts: Any  # the same, for the branches after
