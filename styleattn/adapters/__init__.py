"""Image adapters: projectors of encoded pictures to tokens, and the loaders of their files."""

from ._adapter import Encoder, HostLayer, ImageAdapter, KeyValue, checkpoint_order
from ._files import read_tensors
from .ip_adapter import ip_adapter_from, load_ip_adapter

__all__ = [
    "Encoder",
    "HostLayer",
    "ImageAdapter",
    "KeyValue",
    "checkpoint_order",
    "ip_adapter_from",
    "load_ip_adapter",
    "read_tensors",
]
