"""Inversion: from a picture to the noise that would make it, with every latent on the way."""

from .belm import belm_invert, belm_sample
from .files import FileRefused
from .flow_invert import flow_invert, flow_restore, flow_sample
from .host import (
    HostUnsupported,
    Prompts,
    encode_picture,
    encode_prompts,
    fingerprint,
    read_picture,
)
from .invert import ddim_invert, ddim_sample, round_trip_error
from .noising import noised
from .renoise import ReNoise, renoise_invert
from .trajectory import Trajectory
from .walk import Stopped

__all__ = [
    "FileRefused",
    "HostUnsupported",
    "Prompts",
    "ReNoise",
    "Stopped",
    "Trajectory",
    "belm_invert",
    "belm_sample",
    "ddim_invert",
    "ddim_sample",
    "encode_picture",
    "encode_prompts",
    "fingerprint",
    "flow_invert",
    "flow_restore",
    "flow_sample",
    "noised",
    "read_picture",
    "renoise_invert",
    "round_trip_error",
]
