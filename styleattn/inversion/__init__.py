"""Inversion: from a picture to the noise that would make it, with every latent on the way."""

from .files import FileRefused
from .host import (
    HostUnsupported,
    Prompts,
    encode_picture,
    encode_prompts,
    fingerprint,
    read_picture,
)
from .invert import ddim_invert, ddim_sample, round_trip_error
from .trajectory import Trajectory
from .walk import Stopped

__all__ = [
    "FileRefused",
    "HostUnsupported",
    "Prompts",
    "Stopped",
    "Trajectory",
    "ddim_invert",
    "ddim_sample",
    "encode_picture",
    "encode_prompts",
    "fingerprint",
    "read_picture",
    "round_trip_error",
]
