"""What a method is to a host whose image tokens read references between its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from styleattn.branch import Branch

from ._base import Described, Layer, Number
from ._cross import ImagePrompt


@dataclass(frozen=True)
class BlockCall:
    """The image tokens behind one block of the model.

    Args:
        layer: the block's name and place among those behind which the adapter reads.
        query: [B, H, N, D], of the image tokens.
        prompts: the references that are at work.
        numbers: the method's `NUMBERS`, as numbers or 0-dim tensors.
    """

    layer: Layer
    query: Tensor
    prompts: tuple[ImagePrompt, ...]
    numbers: Mapping[str, Number]


@runtime_checkable
class BlockMethod(Described, Protocol):
    """What a host asks of a method that adds to the image tokens behind blocks."""

    @property
    def adapter(self) -> Any:
        """What makes queries, keys and values, and projects what was read; or its file."""
        ...

    def branches(self, call: BlockCall) -> tuple[Branch, ...]:
        """What the image tokens read; the host projects the sum and adds it to them."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, with the method's name."""
        ...
