"""The methods, by name: one file per paper, pure tensors, no host library."""

from typing import Any

from ._base import Layer, Method, NormCall, Rows, SelfCall
from ._cross import Adapter, CrossCall, CrossParts, EncoderMethod, ImagePrompt
from ._facts import Facts
from ._joint import ContextMethod, JointCall, JointMethod
from .aligned_gen import AlignedGen
from .cross_image_attention import CrossImageAttention
from .ip_adapter import IPAdapter
from .mutual_attention import MutualAttention
from .redux import Redux
from .reference_only import ReferenceOnly
from .style_aligned import StyleAligned
from .style_injection import StyleID
from .visual_style_prompting import VisualStylePrompting
from .z_star import ZStar

_ALL = (
    StyleAligned,
    StyleID,
    CrossImageAttention,
    MutualAttention,
    ReferenceOnly,
    VisualStylePrompting,
    ZStar,
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
    "CrossImageAttention",
    "CrossParts",
    "EncoderMethod",
    "Facts",
    "IPAdapter",
    "ImagePrompt",
    "JointCall",
    "JointMethod",
    "Layer",
    "Method",
    "MutualAttention",
    "NormCall",
    "Redux",
    "ReferenceOnly",
    "Rows",
    "SelfCall",
    "StyleAligned",
    "StyleID",
    "VisualStylePrompting",
    "ZStar",
]
