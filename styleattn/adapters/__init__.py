"""Image adapters: projectors of encoded pictures to tokens, and the loaders of their files."""

from ._adapter import Encoder, HostLayer, ImageAdapter, KeyValue, checkpoint_order
from ._files import read_tensors
from .content import subtract_content
from .csd import CSD, load_csd
from .csgo import CSGO, load_csgo
from .deadiff import DEADiff, load_deadiff
from .flux_ip_adapter import flux_order, load_flux_ip_adapter
from .identity import read_identity, save_identity
from .ip_adapter import ip_adapter_from, load_ip_adapter
from .pulid import PuLID, load_pulid
from .pulid_sdxl import PuLIDSDXLAdapter, load_pulid_sdxl
from .redux import Redux, load_redux
from .style_aware import StyleAwareEncoder, load_style_aware_encoder, style_patches
from .styleshot import load_styleshot
from .uso import USO, load_uso

__all__ = [
    "CSD",
    "CSGO",
    "USO",
    "DEADiff",
    "Encoder",
    "HostLayer",
    "ImageAdapter",
    "KeyValue",
    "PuLID",
    "PuLIDSDXLAdapter",
    "Redux",
    "StyleAwareEncoder",
    "checkpoint_order",
    "flux_order",
    "ip_adapter_from",
    "load_csd",
    "load_csgo",
    "load_deadiff",
    "load_flux_ip_adapter",
    "load_ip_adapter",
    "load_pulid",
    "load_pulid_sdxl",
    "load_redux",
    "load_style_aware_encoder",
    "load_styleshot",
    "load_uso",
    "read_identity",
    "read_tensors",
    "save_identity",
    "style_patches",
    "subtract_content",
]
