"""Pipelines from a directory or from the package, ready to run, or refused in one line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from styleattn import tiny

from .additions import Lora, Word, add_loras, add_words
from .hosts import host_of

TINY = tiny.MODELS[0]
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


def choose_dtype(name: str, device: torch.device, host: str = "unet") -> torch.dtype:
    """The dtype of that name; "auto" is float32 on the CPU and elsewhere float16, on FLUX, which
    leaves the range of float16, bfloat16.

    Raises:
        ModelRefused: an unknown name.
    """
    if name == "auto":
        small = torch.bfloat16 if host == "flux" else torch.float16
        return torch.float32 if device.type == "cpu" else small
    if name not in DTYPES:
        raise ModelRefused(f"unknown dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    variant: str | None = None,
    scheduler: str | None = None,
    offload: bool = False,
    loras: Sequence[Lora] = (),
    words: Sequence[Word] = (),
    controlnet: str | None = None,
) -> Any:
    """A Stable Diffusion 1, 2 or XL or FLUX.1 pipeline, on its device, in its dtype; nothing is
    ever downloaded.

    Args:
        model: an embedded model, "tiny-sdxl" or "tiny-flux", or a directory that
            ``save_pretrained`` wrote.
        device, dtype: names, or "auto" (:func:`choose_device`, :func:`choose_dtype`).
        variant: of the weight files, for example "fp16".
        scheduler: "ddim" replaces a scheduler of another kind by DDIM with the paper's settings;
            "pipeline" keeps it. None is "ddim", on FLUX "pipeline".
        offload: keep on the device only the part that is computing (needs accelerate).
        loras, words: LoRAs and textual inversions that are added.
        controlnet: the folder of a ControlNet, for a pipeline that has none.

    Raises:
        ModelRefused: no such directory, missing or truncated files, a pipeline of another family,
            no such device.
        AdditionRefused, FileNotFoundError: a LoRA or textual inversion that cannot be added.
    """
    if scheduler not in (None, *SCHEDULERS):
        raise ModelRefused(f"unknown scheduler {scheduler!r}: expected one of {SCHEDULERS}")
    place = choose_device(device)
    number = choose_dtype(dtype, place, family_of(model)["host"])
    try:
        pipe = _tiny(model) if model in tiny.MODELS else _directory(model, number, variant)
        host = host_of(pipe, "load_model")
    except TypeError as error:
        raise ModelRefused(str(error)) from error
    if host == "flux" and scheduler == "ddim":
        raise ModelRefused("DDIM is no scheduler of FLUX: its noise runs along straight lines")
    if host == "unet" and scheduler != "pipeline":
        use_ddim(pipe)
    if controlnet is not None:
        pipe = _with_controlnet(pipe, controlnet, number)
    add_loras(pipe, loras)
    add_words(pipe, words)
    parts = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    if loras or any(part.dtype != number for part in parts):
        pipe.to(dtype=number)
    if offload and place.type != "cpu":
        pipe.enable_model_cpu_offload(device=place)
    else:
        pipe.to(place)
    if hasattr(pipe.vae, "enable_slicing"):
        pipe.vae.enable_slicing()  # decode pictures one by one
    return pipe


def family_of(model: str) -> dict[str, Any]:
    """What the files of a model say before it is loaded: ``host``, "unet" or "flux", and whether a
    FLUX is ``guided`` by an embedded scale (schnell is not). What cannot be read is a guided
    "unet": `load_model` says what is wrong with it."""
    try:
        folder = tiny.path(model) if model in tiny.MODELS else Path(model)
        parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if "FluxTransformer2DModel" not in (parts.get("transformer") or ()):
            return {"host": "unet", "guided": True}
        config = json.loads((folder / "transformer" / "config.json").read_text("utf-8"))
        return {"host": "flux", "guided": bool(config.get("guidance_embeds", False))}
    except (OSError, ValueError, AttributeError, TypeError):
        return {"host": "unet", "guided": True}


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


def _tiny(name: str) -> Any:
    try:
        return tiny.load(name)
    except Exception as error:  # a damaged installation: whatever three libraries raise
        raise ModelRefused(
            f"cannot load the embedded model {name}: {_first_line(error)}"
        ) from error


def _directory(model: str, dtype: torch.dtype, variant: str | None) -> Any:
    import diffusers

    path = Path(model)
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "does not exist"
        hint = f"give {' or '.join(tiny.MODELS)} or a directory written by save_pretrained"
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


def _with_controlnet(pipe: Any, folder: str, dtype: torch.dtype) -> Any:
    """The pipeline's parts with a ControlNet.

    Raises:
        ModelRefused: no such folder, damaged files, or a pipeline that takes none.
    """
    import diffusers

    name = type(pipe).__name__
    made = getattr(diffusers, name.replace("Pipeline", "ControlNetPipeline"), None)
    if made is None or getattr(pipe, "unet", None) is None:
        raise ModelRefused(f"a {name} takes no ControlNet")
    if not (Path(folder) / "config.json").is_file():
        raise ModelRefused(f"controlnet {folder} has no config.json: not a diffusers folder")
    try:
        net = diffusers.ControlNetModel.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever three libraries raise
        raise ModelRefused(f"cannot load controlnet {folder}: {_first_line(error)}") from error
    known = inspect.signature(made.__init__).parameters
    kept = {k: v for k, v in {**dict(pipe.config), **pipe.components}.items() if k in known}
    return made(**kept, controlnet=net.to(dtype))


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
