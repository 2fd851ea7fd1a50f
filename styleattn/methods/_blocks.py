"""What a method is to a host whose image tokens read references between its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from styleattn.branch import Branch
from styleattn.references import Layers, Reference, Steps

from ._base import Layer, Number
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
class BlockMethod(Protocol):
    """What a host asks of a method that adds to the image tokens behind blocks."""

    name: ClassVar[str]
    NUMBERS: ClassVar[tuple[str, ...]]

    @property
    def layers(self) -> Layers: ...
    @property
    def steps(self) -> Steps: ...
    @property
    def references(self) -> tuple[Reference, ...] | None: ...
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
