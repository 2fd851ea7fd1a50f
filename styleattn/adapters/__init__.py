"""Image adapters: projectors of encoded pictures to tokens, and the loaders of their files."""

from ._adapter import Encoder, HostLayer, ImageAdapter, KeyValue, checkpoint_order
from ._files import read_tensors
from .csgo import CSGO, load_csgo
from .deadiff import DEADiff, load_deadiff
from .ip_adapter import ip_adapter_from, load_ip_adapter
from .styleshot import load_styleshot

__all__ = [
    "CSGO",
    "DEADiff",
    "Encoder",
    "HostLayer",
    "ImageAdapter",
    "KeyValue",
    "checkpoint_order",
    "ip_adapter_from",
    "load_csgo",
    "load_deadiff",
    "load_ip_adapter",
    "load_styleshot",
    "read_tensors",
]
