"""Files that are either whole or absent: every writer of the package goes through here."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor


class FileRefused(ValueError):
    """A file that is truncated, foreign, or written for something else."""


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a temporary neighbour and ``os.replace``: readers see the old file or
    the whole new one.

    Raises:
        OSError: whatever the file system says (disk full, read-only, no such directory); nothing is
            left behind.
    """
    target = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike[str], data: object) -> None:
    """Write ``data`` as indented JSON, atomically."""
    text = json.dumps(data, indent=2, ensure_ascii=False, sort_keys=False) + "\n"
    write_atomic(path, lambda stream: stream.write(text.encode()))


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    kind: str,
    metadata: Mapping[str, object],
) -> None:
    """Write a safetensors file of one ``kind`` whose metadata is JSON, atomically."""
    header = {"format": kind, "metadata": json.dumps(dict(metadata), sort_keys=True)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(whole, header)
    write_atomic(path, lambda stream: stream.write(data))


def load_tensors(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read a file of :func:`save_tensors`: its tensors on the CPU, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is truncated, is no safetensors file, or is one of another kind.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"no such file: {name}")
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, EOFError) as error:
        raise FileRefused(f"{name} is not a whole safetensors file: {error}") from error
    if header.get("format") != kind:
        found = header.get("format", "no format at all")
        raise FileRefused(f"{name} is not a {kind} file: it says {found!r}")
    try:
        metadata = json.loads(header["metadata"])
    except (KeyError, ValueError) as error:
        raise FileRefused(f"{name} has no readable metadata: {error}") from error
    return tensors, metadata
