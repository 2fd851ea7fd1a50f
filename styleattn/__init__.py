"""Fast, exact attention for reference-image stylization with diffusion models."""

from importlib import import_module
from typing import Any

from styleattn.attention import (
    attention,
    decoupled_attention,
    injected_attention,
    shared_attention,
)
from styleattn.backends import Unsupported, backends
from styleattn.branch import Affine, Branch, Segment
from styleattn.errors import Invalid
from styleattn.statistics import TokenStats, adain_affine, merge, token_stats

__version__ = "0.1.0"

_LAZY = {
    "METHODS": "styleattn.methods",
    "StyleAligned": "styleattn.methods",
    "Reference": "styleattn.references",
    "StyleBank": "styleattn.references",
    "Handle": "styleattn.processors",
    "apply": "styleattn.processors",
    "explain": "styleattn.processors",
    "remove": "styleattn.processors",
    "register_backend": "styleattn.processors.dispatch",
    "build_bank": "styleattn.processors.bank",
}
"""Names that need a host library, and the module that holds them: imported at first use."""

__all__ = [
    "Affine",
    "Branch",
    "Invalid",
    "Segment",
    "TokenStats",
    "Unsupported",
    "adain_affine",
    "attention",
    "backends",
    "decoupled_attention",
    "injected_attention",
    "merge",
    "shared_attention",
    "token_stats",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'styleattn' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
