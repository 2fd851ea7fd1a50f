"""The methods, by name: one file per paper, pure tensors, no host library."""

from typing import Any

from ._base import Layer, Method, NormCall, Rows, SelfCall
from ._cross import Adapter, CrossCall, CrossParts, EncoderMethod, ImagePrompt
from ._facts import Facts
from ._joint import ContextMethod, JointCall, JointMethod
from .csgo import CSGO
from .deadiff import DEADiff
from .ip_adapter import IPAdapter
from .pulid_sdxl import PuLIDSDXL
from .rb_modulation import RBModulation
from .style_aligned import StyleAligned
from .style_injection import StyleID
from .style_shot import StyleShot
from .style_studio import StyleStudio, StyleStudioTeacher

_ALL = (
    StyleAligned,
    StyleID,
    IPAdapter,
    CSGO,
    DEADiff,
    StyleShot,
    RBModulation,
    StyleStudio,
    StyleStudioTeacher,
    PuLIDSDXL,
)
METHODS: dict[str, type[Any]] = {m.name: m for m in _ALL}
"""Every method by the name that settings and the command line use."""

__all__ = [
    "CSGO",
    "METHODS",
    "Adapter",
    "ContextMethod",
    "CrossCall",
    "CrossParts",
    "DEADiff",
    "EncoderMethod",
    "Facts",
    "IPAdapter",
    "ImagePrompt",
    "JointCall",
    "JointMethod",
    "Layer",
    "Method",
    "NormCall",
    "PuLIDSDXL",
    "RBModulation",
    "Rows",
    "SelfCall",
    "StyleAligned",
    "StyleID",
    "StyleShot",
    "StyleStudio",
    "StyleStudioTeacher",
]
