"""Files of identities: what PuLID makes its tokens of, or the tokens themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from styleattn.inversion import FileRefused
from styleattn.inversion.files import load_tensors, save_tensors

from ._idformer import LEVELS

KIND = "styleattn.identity"
_VISION = tuple(f"vision.{i}" for i in range(LEVELS))


def save_identity(
    path: str | os.PathLike[str],
    face: Tensor | None = None,
    vision: Sequence[Tensor] = (),
    *,
    tokens: Tensor | None = None,
) -> None:
    """Write an identity as a safetensors file, whole or not at all.

    Args:
        path: where to.
        face, vision: the inputs of `PuLID.tokens`, as `FaceAnalyser` makes them.
        tokens: or its tokens [M, C]; they belong to one PuLID checkpoint.

    Raises:
        ValueError: neither or both.
    """
    if (tokens is None) == (face is None) or len(vision) != (0 if face is None else LEVELS):
        raise ValueError(f"save_identity takes face and {LEVELS} tensors vision, or tokens")
    found = dict(zip(_VISION, vision, strict=True)) if face is not None else {}
    own = {"face": face} if tokens is None else {"tokens": tokens}
    save_tensors(path, {**found, **{k: v for k, v in own.items() if v is not None}}, KIND, {})


def read_identity(path: str | os.PathLike[str]) -> Tensor | tuple[Tensor, list[Tensor]]:
    """The tokens of a file of `save_identity`, or its face and vision.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, foreign, or lacks a part.
    """
    tensors, _ = load_tensors(path, KIND)
    if set(tensors) == {"tokens"}:
        return tensors["tokens"]
    lacking = [name for name in ("face", *_VISION) if name not in tensors]
    if lacking:
        raise FileRefused(f"{os.fspath(path)}: the identity lacks {', '.join(lacking)}")
    return tensors["face"], [tensors[name] for name in _VISION]
