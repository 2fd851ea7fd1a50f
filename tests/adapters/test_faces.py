"""Face analysis: our own steps by formula, the packages' steps with stand-ins for the packages."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from styleattn.adapters.faces import FILES, FaceAnalyser, face_inputs, prepare_face
from styleattn.errors import Invalid

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_face_is_grey_on_white() -> None:
    face = torch.rand(2, 3, 12, 12)
    labels = torch.arange(288).reshape(2, 12, 12) % 19
    grey = 0.299 * face[:, :1] + 0.587 * face[:, 1:2] + 0.114 * face[:, 2:]
    expected = grey.repeat(1, 3, 1, 1)
    for label in (0, 16, 18, 7, 8, 9, 14, 15):
        expected = expected.masked_fill((labels == label)[:, None], 1.0)
    expected = F.interpolate(expected, (30, 30), mode="bicubic", antialias=True)
    close(prepare_face(face, labels, side=30), (expected - MEAN) / STD)
    with pytest.raises(Invalid, match=r"labels \[R, H, W\]"):
        prepare_face(face, labels[:, :3])


def test_embeddings_are_joined_and_one_is_normalised() -> None:
    a, e = torch.randn(2, 5) * 9, torch.randn(2, 4) * 3
    close(face_inputs(a, e), torch.cat((a, F.normalize(e)), 1))


class Finder:
    """insightface's part: every face is a box and an embedding."""

    faces: tuple[Any, ...] = ()

    def __init__(self, **options: Any) -> None:
        assert options["name"] == "antelopev2"
        self.models = {"recognition": self}

    def prepare(self, ctx_id: int, det_size: tuple[int, int]) -> None:
        pass

    def get(self, bgr: np.ndarray) -> list[Any]:
        self.seen = bgr
        return list(self.faces)

    def get_feat(self, aligned: np.ndarray) -> np.ndarray:
        return np.full((1, 5), aligned.mean(), np.float32)


class Helper:
    """facexlib's part: the face is the picture's corner."""

    def __init__(self, **options: Any) -> None:
        self.cropped_faces: list[np.ndarray] = []

    def clean_all(self) -> None:
        self.cropped_faces = []

    def read_image(self, bgr: np.ndarray) -> None:
        self.image = bgr

    def get_face_landmarks_5(self, only_center_face: bool) -> None:
        pass

    def align_warp_face(self) -> None:
        if self.image.any():
            self.cropped_faces = [self.image[:8, :8]]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def parser(**options: Any) -> Any:
        return lambda x: (x.repeat(1, 7, 1, 1)[:, :19],)

    contents = {
        "insightface.app": {"FaceAnalysis": Finder},
        "facexlib.utils.face_restoration_helper": {"FaceRestoreHelper": Helper},
        "facexlib.parsing": {"init_parsing_model": parser},
    }
    for name in ("insightface", "facexlib", "facexlib.utils", *contents):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for key, value in contents.get(name, {}).items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def tower(pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    return pixels.mean((2, 3)), [pixels.mean()[None] + i for i in range(5)]


def test_the_largest_face_is_taken_and_the_tower_sees_the_aligned_one(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = np.arange(5.0, dtype=np.float32), np.arange(5.0, 10.0, dtype=np.float32)
    boxes = ({"bbox": (0, 0, 9, 9), "embedding": large}, {"bbox": (1, 1, 3, 4), "embedding": small})
    monkeypatch.setattr(Finder, "faces", boxes)
    analyser = FaceAnalyser(tower, packages)
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    face, vision = analyser(image)
    assert np.array_equal(analyser.finder.seen, image[..., ::-1])  # insightface reads BGR
    crop = torch.from_numpy(image[:8, :8]).permute(2, 0, 1)[None] / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    labels = ((crop - mean) / std).repeat(1, 7, 1, 1)[:, :19].argmax(1)
    embed, hidden = tower(prepare_face(crop, labels))
    close(face, torch.cat((torch.from_numpy(large)[None], F.normalize(embed)), 1))
    close(torch.stack(vision), torch.stack(hidden))
    monkeypatch.setattr(Finder, "faces", ())  # the finder saw none, the aligner did
    close(analyser(image)[0][:, :5], torch.full((1, 5), float(image[:8, :8].mean())))


def test_what_is_missing_is_named(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analyser = FaceAnalyser(tower, packages)
    with pytest.raises(ValueError, match="no face was found"):
        analyser(np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"uint8, got \(9, 9\) float64"):
        analyser(np.zeros((9, 9)))
    (packages / FILES[0]).unlink()
    (packages / FILES[3]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {FILES[0]}, {FILES[3]}$"):
        FaceAnalyser(tower, packages)
    for name in ("insightface", "facexlib"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"insightface and facexlib: pip install 'styleattn\[face\]'"
    ):
        FaceAnalyser(tower, packages)
