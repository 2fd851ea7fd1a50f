"""Pipelines from a directory or from the package, ready to run, or refused in one line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from styleattn.inversion.host import check_host

TINY = "tiny-sdxl"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULERS = ("ddim", "pipeline")


class ModelRefused(ValueError):
    """A model that cannot be loaded, or a device or dtype that is not there."""


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" takes CUDA or ROCm, then MPS, then the CPU.

    Raises:
        ModelRefused: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelRefused(f"no device {name!r} here: {_first_line(error)}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is float32 on the CPU and float16 elsewhere.

    Raises:
        ModelRefused: an unknown name.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise ModelRefused(f"unknown dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    variant: str | None = None,
    scheduler: str = "ddim",
    offload: bool = False,
) -> Any:
    """A Stable Diffusion 1, 2 or XL pipeline, on its device, in its dtype; nothing is ever
    downloaded.

    Args:
        model: "tiny-sdxl", the embedded model, or a directory that ``save_pretrained`` wrote.
        device, dtype: names, or "auto" (:func:`choose_device`, :func:`choose_dtype`).
        variant: of the weight files, for example "fp16".
        scheduler: "ddim" replaces a scheduler of another kind by DDIM with the paper's settings;
            "pipeline" keeps it.
        offload: keep on the device only the part that is computing (needs accelerate).

    Raises:
        ModelRefused: no such directory, missing or truncated files, a pipeline of another family,
            no such device.
    """
    if scheduler not in SCHEDULERS:
        raise ModelRefused(f"unknown scheduler {scheduler!r}: expected one of {SCHEDULERS}")
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    try:
        pipe = _tiny() if model == TINY else _directory(model, number, variant)
        check_host(pipe, "load_model")
    except TypeError as error:
        raise ModelRefused(str(error)) from error
    if scheduler == "ddim":
        use_ddim(pipe)
    parts = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    if any(part.dtype != number for part in parts):
        pipe.to(dtype=number)
    if offload and place.type != "cpu":
        pipe.enable_model_cpu_offload(device=place)
    else:
        pipe.to(place)
    if hasattr(pipe.vae, "enable_slicing"):
        pipe.vae.enable_slicing()  # decode pictures one by one
    return pipe


def use_ddim(pipe: Any) -> None:
    """Give the pipeline a DDIM scheduler with the paper's settings, unless it has a DDIM scheduler
    already.

    β, prediction type and zero-terminal-SNR rescaling stay the model's own.
    """
    from diffusers import DDIMScheduler

    if isinstance(pipe.scheduler, DDIMScheduler):
        return
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0,
        timestep_spacing="leading",
    )


def _tiny() -> Any:
    from styleattn import tiny

    try:
        return tiny.load()
    except Exception as error:  # a damaged installation: whatever three libraries raise
        raise ModelRefused(f"cannot load the embedded model: {_first_line(error)}") from error


def _directory(model: str, dtype: torch.dtype, variant: str | None) -> Any:
    import diffusers

    path = Path(model)
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "does not exist"
        hint = f"give {TINY} or a directory written by save_pretrained"
        raise ModelRefused(f"model {model} {what}: {hint}")
    if not (path / "model_index.json").is_file():
        raise ModelRefused(f"model {model} has no model_index.json: not a diffusers directory")
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    name = "dtype" if release >= (0, 42) else "torch_dtype"  # diffusers renamed the argument
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            path, **{name: dtype}, variant=variant, local_files_only=True
        )
    except Exception as error:  # whatever three libraries raise
        raise ModelRefused(f"cannot load model {model}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Within: no progress bars and notes of diffusers and transformers; for the loading of models.

    Their warnings speak again afterwards (a prompt that is cut off, for example); the bars stay
    away.
    """
    import transformers

    speakers = [transformers.utils.logging]
    levels = [speakers[0].get_verbosity()]
    speakers[0].set_verbosity_error()  # before diffusers imports it all
    import diffusers

    speakers.append(diffusers.utils.logging)
    levels.append(speakers[1].get_verbosity())
    speakers[1].set_verbosity_error()
    for speaker in speakers:
        speaker.disable_progress_bar()
    try:
        yield
    finally:
        for speaker, level in zip(speakers, levels, strict=True):
            speaker.set_verbosity(level)


def versions() -> dict[str, str | None]:
    """The versions of everything that results depend on; None where a package is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("styleattn", "torch", "diffusers", "transformers", "triton", "numpy", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
