"""Pipelines with random weights, and a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def hosts() -> ModuleType:
    """tests/random_pipelines.py."""
    path = Path(__file__).resolve().parents[1] / "random_pipelines.py"
    spec = importlib.util.spec_from_file_location("random_pipelines", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
