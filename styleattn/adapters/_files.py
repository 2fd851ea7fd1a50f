"""Published checkpoints: read as tensors and nothing else, and taken whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import safetensors
import torch
from torch import Tensor, nn

from styleattn.inversion.files import FileRefused

Tensors = Mapping[str, Tensor]
_SHOWN = 6  # names per kind of fault in a message


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of a ``.safetensors`` file or of a PyTorch pickle, on the CPU, under flat names.

    Nested dictionaries become dotted names: ``{"image_proj": {"latents": x}}`` gives
    ``image_proj.latents``, as safetensors files have it. What is no tensor (a step count, say) is
    left out. Pickles are read with ``weights_only=True``: a file that asks for code is refused. The
    kind of file is told by its first bytes, not by its name.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is truncated, is of neither kind, asks for code, or holds no tensor.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"no such file: {name}")
    with open(name, "rb") as stream:
        start = stream.read(4)
    tensors = _read_pickle(name) if _is_pickle(start) else _read_safetensors(name)
    if not tensors:
        raise FileRefused(f"{name} holds no tensor")
    return tensors


def _is_pickle(start: bytes) -> bool:
    """Whether a file starts like a zip of PyTorch, or like the pickle of older versions."""
    return start == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04")


def _read_safetensors(name: str) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            # cloned: else the file, should it change, would change or take away the tensors
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, EOFError) as error:
        raise FileRefused(
            f"{name} is neither a whole safetensors file nor a PyTorch checkpoint: {error}"
        ) from error


def _read_pickle(name: str) -> dict[str, Tensor]:
    try:
        with open(name, "rb") as stream:  # given a name, torch would go by its ending
            data = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        detail = next(
            (line for line in reason if "Unsupported" in line), reason[0] if reason else ""
        )
        raise FileRefused(
            f"{name} is damaged, or asks for more than tensors, which is never loaded "
            f"({detail.strip()}). Convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, zipfile.BadZipFile) as error:
        raise FileRefused(f"{name} is not a whole PyTorch checkpoint: {error}") from error
    if not isinstance(data, Mapping):
        raise FileRefused(f"{name} holds a {type(data).__name__}, not a dictionary of tensors")
    flat: dict[str, Tensor] = {}
    for key, tensor in _leaves(data, ""):
        if key in flat:
            raise FileRefused(f"{name} holds two tensors of the name {key}")
        flat[key] = tensor
    return flat


def _leaves(data: Mapping[object, object], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in data.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")


def part(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def size(tensors: Tensors, default: int, *places: tuple[str, int]) -> int:
    """A size that a file tells in several places, by vote: one wrong tensor then is one fault.

    Args:
        default: the published size, where the file has none of the places.
        places: names of tensors, and the axis of each.
    """
    found = [tensors[key].shape[axis] for key, axis in places if _has(tensors, key, axis)]
    return Counter(found).most_common(1)[0][0] if found else default


def _has(tensors: Tensors, key: str, axis: int) -> bool:
    return key in tensors and tensors[key].dim() > axis


def fill(
    module: nn.Module,
    tensors: Tensors,
    *,
    source: str,
    what: str,
    names: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Make the tensors of a file the parameters of a module, if every name and shape is right.

    Nothing is copied: a module built on the meta device becomes real.

    Args:
        source: the file, for the message.
        what: what it should have been, for the message.
        names: what the file calls the module's tensors; None: as the module does.
        dtype: of the parameters; None keeps what the file has.

    Raises:
        FileRefused: names all tensors that are missing, unexpected, or of another shape.
    """
    wanted = module.state_dict()
    places = {key: key for key in wanted} if names is None else names
    check(tensors, {places[key]: value.shape for key, value in wanted.items()}, source, what)
    state = {key: tensors[places[key]] for key in wanted}
    if dtype is not None:
        state = {key: value.to(dtype) for key, value in state.items()}
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def check(tensors: Tensors, expected: Mapping[str, Sequence[int]], source: str, what: str) -> None:
    """Hold the tensors of a file against names and shapes.

    Raises:
        FileRefused: names all tensors that are missing, unexpected, or of another shape or type.
    """
    wrong = [
        f"{key} is {_shape(tensors[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in tensors
        and (tuple(tensors[key].shape) != tuple(shape) or not tensors[key].is_floating_point())
    ]
    faults = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "wrong": wrong,
    }
    lines = "".join(f"\n    {_fault(kind, names)}" for kind, names in faults.items() if names)
    if lines:
        raise FileRefused(f"{source} is not {what}:{lines}")


def _shape(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{kind}"


def _fault(kind: str, names: Sequence[str]) -> str:
    """``missing 40: a, b, c, and 37 more``."""
    rest = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{kind} {len(names)}: {', '.join(names[:_SHOWN])}{rest}"
