"""What an encoder method is to a host: image tokens next to the text in cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from styleattn.branch import Branch, Segment

from ._base import Described, Layer, Number, Rows


@dataclass(frozen=True)
class ImagePrompt:
    """One image at one cross-attention layer.

    Args:
        key, value: [R, H, M, D], its tokens under the layer's own projections.
        rows: for every row of the call, the row of key and value that it sees; -1 for none.
        weight: the image's own weight here and now, times the method's gate.
        mask: [N] factor on what each query gets from it, or None.
        index: which of the method's references it is.
    """

    key: Tensor
    value: Tensor
    rows: Tensor
    weight: Number
    mask: Tensor | None
    index: int


@dataclass(frozen=True)
class CrossCall:
    """One call of a cross-attention layer.

    Args:
        layer: its name and place among the cross-attention layers.
        query: [B, H, N, D]; key, value: [B, H, S, D], of the text.
        key_bias: [B, S] additive on the text's logits, or None.
        prompts: the images of this method that are at work.
        rows: what the rows are.
        gate: the method's own weight here and now.
        numbers: the method's `NUMBERS`, as numbers or 0-dim tensors.
    """

    layer: Layer
    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    prompts: tuple[ImagePrompt, ...]
    rows: Rows
    gate: Number
    numbers: Mapping[str, Number]


@dataclass(frozen=True)
class CrossParts:
    """What a method adds to a cross-attention layer; all methods of a layer share one call of the
    operation.

    Args:
        segments: further keys in the text's own softmax.
        branches: further softmaxes, added to the text's output with their weights.
        text_weight: factor on the text's branch (number, [B] or [B, N]).
        loaded_weight: factor on the images of adapters that the pipeline has loaded.
        apart: further softmaxes whose outputs `after` receives one by one.
        after: makes a new text's output of it and the outputs apart, each [B, H, N, D], before
            the branches of any method are added.
    """

    segments: tuple[Segment, ...] = ()
    branches: tuple[Branch, ...] = ()
    text_weight: Number = 1.0
    loaded_weight: Number = 1.0
    apart: tuple[Branch, ...] = ()
    after: Callable[[Tensor, tuple[Tensor, ...]], Tensor] | None = None


class Adapter(Protocol):
    """What a host asks of an image adapter: see `styleattn.adapters`."""

    def tokens(self, embeds: Tensor) -> Tensor:
        """Image tokens [R, M, C] of encoder outputs [R, ...]."""
        ...

    def negative(self, embeds: Tensor) -> Tensor:
        """The encoder output that stands for no image, shaped like the given one."""
        ...

    def key_value(self, layer: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, M, H * D] of tokens at a layer of the host.

        Raises:
            KeyError: the adapter has no projections for the layer.
        """
        ...


@runtime_checkable
class EncoderMethod(Described, Protocol):
    """What a host asks of a method on cross-attention."""

    @property
    def adapter(self) -> Any:
        """The adapter that makes tokens and keys of the references, or its file; None for those
        that are loaded in the pipeline: then every call has no prompts, and a gate that may be
        0."""
        ...

    def takes_cross(self, layer: Layer) -> bool:
        """Whether the method changes a cross-attention layer."""
        ...

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """What the method adds to the layer."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, with the method's name."""
        ...
