"""The methods, by name: one file per paper, pure tensors, no host library."""

from ._base import Layer, Method, NormCall, Rows, SelfCall
from .style_aligned import StyleAligned

METHODS = {StyleAligned.name: StyleAligned}
"""Every method by the name that settings and the command line use."""

__all__ = ["METHODS", "Layer", "Method", "NormCall", "Rows", "SelfCall", "StyleAligned"]
