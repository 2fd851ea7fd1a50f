"""A picture of a face to the inputs of PuLID; needs packages that styleattn does not."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from styleattn.errors import describe, invalid

from ._adapter import CLIP_MEAN, CLIP_STD

Tower = Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]]
PACKAGES = ("insightface", "facexlib")
FILES = (
    "models/antelopev2/glintr100.onnx",
    "models/antelopev2/scrfd_10g_bnkps.onnx",
    "detection_Resnet50_Final.pth",
    "parsing_parsenet.pth",
    "parsing_bisenet.pth",
)
_GREY = (0.299, 0.587, 0.114)
_BACKGROUND = (0, 7, 8, 9, 14, 15, 16, 18)  # of the parser's 19 classes: not the face
_PARSER_MEAN, _PARSER_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prepare_face(face: Tensor, labels: Tensor, side: int = 336) -> Tensor:
    """Pixels for the vision tower: the face in grey on white, resized (bicubic), normalised.

    Args:
        face: [R, 3, H, W], RGB in [0, 1], aligned.
        labels: [R, H, W], the face parser's classes.
        side: of the result [R, 3, side, side].

    Raises:
        Invalid: other shapes.
    """
    if face.dim() != 4 or face.shape[1] != 3 or labels.shape != (face.shape[0], *face.shape[2:]):
        reason = "face must be [R, 3, H, W] and labels [R, H, W]"
        raise invalid("prepare_face", [reason], f"face {describe(face)}, labels {describe(labels)}")
    grey = (face * _channels(_GREY, face)).sum(1, keepdim=True)
    outside = torch.isin(labels, torch.tensor(_BACKGROUND, device=labels.device))
    shown = torch.where(outside[:, None], torch.ones_like(face), grey)
    shown = F.interpolate(shown, (side, side), mode="bicubic", antialias=True)
    return (shown - _channels(CLIP_MEAN, face)) / _channels(CLIP_STD, face)


def face_inputs(arcface: Tensor, embed: Tensor) -> Tensor:
    """`[a, e / |e|]`: the face embedding [R, 1280], of ArcFace's [R, 512] and the tower's
    [R, 768]."""
    return torch.cat((arcface.to(embed), embed / embed.norm(dim=-1, keepdim=True)), dim=-1)


class FaceAnalyser:
    """Finds the face of a picture and makes the inputs of `PuLID.tokens` of it.

    ArcFace's embedding is that of the largest face; the vision tower sees the face at the centre,
    aligned, in grey, on white. Nothing is downloaded.

    Args:
        tower: EVA02-CLIP-L-336's vision tower: pixels [1, 3, 336, 336] to its embedding [1, 768]
            and the hidden states [1, 577, 1024] before its blocks 4, 8, 12, 16 and 20.
        models: the folder of the other weights; `FILES` are looked for in it.
        device: of the aligner and the parser.

    Raises:
        ImportError: names the packages that are missing; PuLID also takes embeddings directly.
        FileNotFoundError: names the files that are missing.
    """

    def __init__(
        self, tower: Tower, models: str | os.PathLike[str], device: str | torch.device = "cpu"
    ) -> None:
        absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if absent:
            raise ImportError(
                f"FaceAnalyser needs {' and '.join(absent)}: pip install 'styleattn[face]'; or make"
                " the face embedding and the vision features elsewhere and give them to PuLID"
            )
        folder = Path(models)
        lacking = [name for name in FILES if not (folder / name).is_file()]
        if lacking:
            raise FileNotFoundError(f"FaceAnalyser: {folder} lacks {', '.join(lacking)}")
        self.tower = tower
        self.device = torch.device(device)
        self.finder = _finder(folder)
        self.helper, self.parser = _aligner(folder, self.device)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        """The face embedding [1, 1280] and the five hidden states of a picture.

        Args:
            image: [H, W, 3], RGB, uint8.

        Raises:
            ValueError: another shape or type, or a picture without a face.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image must be [H, W, 3] uint8, got {image.shape} {image.dtype}")
        bgr = np.ascontiguousarray(image[..., ::-1])
        aligned = self._align(bgr)
        found = sorted(self.finder.get(bgr), key=_area)
        if found:
            arcface = found[-1]["embedding"]
        else:  # small for the finder, and still a face to the aligner
            arcface = self.finder.models["recognition"].get_feat(aligned)
        rgb = torch.from_numpy(np.ascontiguousarray(aligned[..., ::-1])).to(self.device)
        face = rgb.permute(2, 0, 1)[None].float() / 255
        normal = (face - _channels(_PARSER_MEAN, face)) / _channels(_PARSER_STD, face)
        labels = self.parser(normal)[0].argmax(dim=1)
        embed, hidden = self.tower(prepare_face(face, labels))
        return face_inputs(torch.as_tensor(arcface).reshape(1, -1), embed), list(hidden)

    def _align(self, bgr: np.ndarray) -> np.ndarray:
        self.helper.clean_all()
        self.helper.read_image(bgr)
        self.helper.get_face_landmarks_5(only_center_face=True)
        self.helper.align_warp_face()
        if not self.helper.cropped_faces:
            raise ValueError("no face was found in the picture")
        aligned: np.ndarray = self.helper.cropped_faces[0]
        return aligned


def _area(face: Any) -> float:
    left, top, right, bottom = face["bbox"]
    return float((right - left) * (bottom - top))


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values).to(like)[:, None, None]


def _finder(folder: Path) -> Any:
    app = importlib.import_module("insightface.app")
    finder = app.FaceAnalysis(
        name="antelopev2", root=str(folder), providers=["CPUExecutionProvider"]
    )
    finder.prepare(ctx_id=0, det_size=(640, 640))
    return finder


def _aligner(folder: Path, device: torch.device) -> tuple[Any, Any]:
    helpers = importlib.import_module("facexlib.utils.face_restoration_helper")
    parsing = importlib.import_module("facexlib.parsing")
    helper = helpers.FaceRestoreHelper(
        upscale_factor=1,
        face_size=512,
        crop_ratio=(1, 1),
        det_model="retinaface_resnet50",
        save_ext="png",
        device=device,
        model_rootpath=str(folder),
    )
    parser = parsing.init_parsing_model(
        model_name="bisenet", device=device, model_rootpath=str(folder)
    )
    return helper, parser
