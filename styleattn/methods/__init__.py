"""The methods, by name: one file per paper, pure tensors, no host library."""

from typing import Any

from ._base import Layer, Method, NormCall, Rows, SelfCall
from ._cross import Adapter, CrossCall, CrossParts, EncoderMethod, ImagePrompt
from ._facts import Facts
from ._joint import ContextMethod, JointCall, JointMethod
from .aligned_gen import AlignedGen
from .ip_adapter import IPAdapter
from .redux import Redux
from .style_aligned import StyleAligned
from .style_injection import StyleID

_ALL = (
    StyleAligned,
    StyleID,
    IPAdapter,
    AlignedGen,
    Redux,
)
METHODS: dict[str, type[Any]] = {m.name: m for m in _ALL}
"""Every method by the name that settings and the command line use."""

__all__ = [
    "METHODS",
    "Adapter",
    "AlignedGen",
    "ContextMethod",
    "CrossCall",
    "CrossParts",
    "EncoderMethod",
    "Facts",
    "IPAdapter",
    "ImagePrompt",
    "JointCall",
    "JointMethod",
    "Layer",
    "Method",
    "NormCall",
    "Redux",
    "Rows",
    "SelfCall",
    "StyleAligned",
    "StyleID",
]
