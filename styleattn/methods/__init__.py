"""The methods, by name: one file per paper, pure tensors, no host library."""

from typing import Any

from ._base import Layer, Method, NormCall, Rows, SelfCall
from ._blocks import BlockCall, BlockMethod
from ._cross import Adapter, CrossCall, CrossParts, EncoderMethod, ImagePrompt
from ._facts import Facts
from ._joint import ContextMethod, JointCall, JointMethod
from .aligned_gen import AlignedGen
from .cross_image_attention import CrossImageAttention
from .csgo import CSGO
from .deadiff import DEADiff
from .diptych import FillDiptych
from .easy_control import EasyControl
from .in_context import InContext
from .instant_style import InstantStyle
from .instant_style_plus import InstantStylePlus
from .ip_adapter import IPAdapter
from .mutual_attention import MutualAttention
from .omini_control import OminiControl
from .pulid_flux import PuLIDFLUX
from .pulid_sdxl import PuLIDSDXL
from .rb_modulation import RBModulation
from .redux import Redux
from .reference_only import ReferenceOnly
from .style_aligned import StyleAligned
from .style_injection import StyleID
from .style_shot import StyleShot
from .style_studio import StyleStudio, StyleStudioTeacher
from .uso import USO
from .visual_style_prompting import VisualStylePrompting
from .weight_types import WEIGHT_TYPES, weight_type
from .z_star import ZStar

_ALL = (
    StyleAligned,
    StyleID,
    VisualStylePrompting,
    ZStar,
    CrossImageAttention,
    MutualAttention,
    ReferenceOnly,
    IPAdapter,
    InstantStyle,
    InstantStylePlus,
    CSGO,
    DEADiff,
    StyleShot,
    RBModulation,
    StyleStudio,
    StyleStudioTeacher,
    PuLIDSDXL,
    PuLIDFLUX,
    AlignedGen,
    Redux,
    USO,
    FillDiptych,
    InContext,
    EasyControl,
    OminiControl,
)
METHODS: dict[str, type[Any]] = {m.name: m for m in _ALL}
"""Every method by the name that settings and the command line use."""

__all__ = [
    "CSGO",
    "METHODS",
    "USO",
    "WEIGHT_TYPES",
    "Adapter",
    "AlignedGen",
    "BlockCall",
    "BlockMethod",
    "ContextMethod",
    "CrossCall",
    "CrossImageAttention",
    "CrossParts",
    "DEADiff",
    "EasyControl",
    "EncoderMethod",
    "Facts",
    "FillDiptych",
    "IPAdapter",
    "ImagePrompt",
    "InContext",
    "InstantStyle",
    "InstantStylePlus",
    "JointCall",
    "JointMethod",
    "Layer",
    "Method",
    "MutualAttention",
    "NormCall",
    "OminiControl",
    "PuLIDFLUX",
    "PuLIDSDXL",
    "RBModulation",
    "Redux",
    "ReferenceOnly",
    "Rows",
    "SelfCall",
    "StyleAligned",
    "StyleID",
    "StyleShot",
    "StyleStudio",
    "StyleStudioTeacher",
    "VisualStylePrompting",
    "ZStar",
    "weight_type",
]
