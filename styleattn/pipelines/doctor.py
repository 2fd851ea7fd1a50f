"""What can run on this machine, and what keeps the rest from running."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

import styleattn

SUPPORTED = {"diffusers": (0, 36), "transformers": (4, 57), "torch": (2, 10)}
_NEEDED_FOR = {"diffusers": "the hosts", "transformers": "text encoders", "torch": "everything"}


class Check(NamedTuple):
    """One finding: ``state`` is "ok", "absent" (something optional) or "broken"."""

    name: str
    state: str
    text: str


def examine(model: str | None = None) -> list[Check]:
    """Every check; none of them raises.

    Args:
        model: a directory that ``save_pretrained`` wrote, to be loaded as well.
    """
    checks = [Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    further = () if model is None else ((f"model {model}", lambda: _model(model)),)
    for name, examiner in (*_EXAMINERS, *further):
        try:
            checks += examiner()
        except Exception as error:  # a broken installation is what this command is for
            checks.append(Check(name, "broken", f"{type(error).__name__}: {error}"))
    return checks


def _packages() -> list[Check]:
    found = []
    for name, least in SUPPORTED.items():
        need = ".".join(map(str, least))
        try:
            has = version(name)
        except PackageNotFoundError:
            text = f"not installed; {_NEEDED_FOR[name]} need at least {need}"
            found.append(Check(name, "absent", text))
            continue
        numbers = tuple(int(part) for part in has.split("+")[0].split(".")[:2])
        state, text = ("ok", has) if numbers >= least else ("broken", f"{has}, too old: {need}")
        found.append(Check(name, state, text))
    for name in ("triton", "accelerate", "peft"):
        state = "ok" if importlib.util.find_spec(name) else "absent"
        found.append(Check(name, state, version(name) if state == "ok" else "not installed"))
    return found


def _backends() -> list[Check]:
    return [
        Check(f"backend {row.name}", "ok" if row.available else "absent", row.detail)
        for row in styleattn.backends()
    ]


def _devices() -> list[Check]:
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    found = [Check("device cpu", "ok", threads)]
    if not torch.cuda.is_available():
        found.append(Check("device cuda", "absent", "no CUDA or ROCm device that PyTorch can use"))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        text = (
            f"{torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
        found.append(Check(f"device cuda:{i}", "ok", text))
    if torch.backends.mps.is_available():
        found.append(Check("device mps", "ok", "Metal"))
    return found


def _operation() -> list[Check]:
    """The operation on a small input, every backend that can run it against the specification."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 33, 16, generator=generator) for _ in range(3))
    rows = torch.zeros(2, dtype=torch.int64)
    expected = styleattn.shared_attention(q, k, v, reference_rows=rows, backend="reference")
    found = []
    for row in styleattn.backends():
        if not row.available or row.name == "reference":
            continue
        try:
            out = styleattn.shared_attention(q, k, v, reference_rows=rows, backend=row.name)
        except styleattn.Unsupported as error:
            text = " ".join(str(error).split())
            found.append(Check(f"operation on {row.name}", "absent", text))
            continue
        error_found = float((out - expected).abs().max())  # type: ignore[operator]
        state = "ok" if error_found < 1e-4 else "broken"
        found.append(
            Check(f"operation on {row.name}", state, f"error {error_found:.1e} on the CPU")
        )
    return found


def _embedded() -> list[Check]:
    from styleattn.tiny import MODELS

    if not importlib.util.find_spec("diffusers"):
        missing = "needs diffusers: pip install 'styleattn[diffusers]'"
        return [Check(name, "absent", missing) for name in MODELS]
    return [_loaded(name, name) for name in MODELS]


def _model(model: str) -> list[Check]:
    return [_loaded(f"model {model}", model)]


def _loaded(name: str, model: str) -> Check:
    """Load a model and say what it is and which methods have a recipe for it."""
    from .hosts import denoiser, host_of
    from .models import hushed, load_model
    from .recipes import recipes_on

    with hushed():
        pipe = load_model(model, device="cpu")
    network = denoiser(pipe)
    count = sum(p.numel() for p in network.parameters())
    kind = "UNet" if host_of(pipe) == "unet" else "FLUX transformer"
    recipes, drawn = recipes_on(host_of(pipe)), type(pipe).__name__
    fit = [n for n, r in recipes.items() if host_of(pipe) == "unet" or r.pipeline == drawn]
    methods = ", ".join(fit) or "none"
    text = f"loads; a {kind} of {count / 1e6:.1f} million parameters; stylize has {methods}"
    return Check(name, "ok", text)


def _disk() -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    state = "ok" if free > 2**30 else "broken"
    return [Check("disk", state, f"{free / 2**30:.1f} GiB free in {Path.cwd()}")]


_EXAMINERS: tuple[tuple[str, Callable[[], list[Check]]], ...] = (
    ("packages", _packages),
    ("backends", _backends),
    ("devices", _devices),
    ("operation", _operation),
    ("embedded models", _embedded),
    ("disk", _disk),
)
