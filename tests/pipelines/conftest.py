"""Pipelines with random weights, and a picture."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def hosts() -> ModuleType:
    """The pipelines of tests/random_pipelines.py."""
    import random_pipelines

    return random_pipelines


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
