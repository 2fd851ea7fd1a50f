"""Which backends can run here, which one runs a call, and every reason why the others cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from styleattn.branch import Branch, describe_call
from styleattn.errors import describe
from styleattn.measured import TABLE, find

MODULES = {
    "reference": "styleattn.reference",
    "torch": "styleattn.torch_backend",
    "cpu": "styleattn.cpu_backend",
    "triton": "styleattn.kernels.attention",
}
_STATS = {"triton": "styleattn.kernels.stats"}
ENVIRONMENT = "STYLEATTN_BACKEND"
FAST = ("triton", "reference")
PREFERENCE = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "torch", "reference")}
"""Order of choice for `backend=None`; `measured.TABLE` reorders it for calls that it knows."""

_loaded: dict[str, ModuleType] = {}


class Unsupported(ValueError):
    """A backend that was asked for cannot run the call: every reason at once."""


@dataclass(frozen=True)
class BackendStatus:
    """One row of `backends()`: a backend, whether it can run here, what it runs on, and why not."""

    name: str
    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<10} {'yes' if self.available else 'no':<4} {self.detail}"


class Backends(tuple[BackendStatus, ...]):
    """The table `backends()` returns; prints itself, and answers `"cpu" in backends()` for what is
    available."""

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self)

    def __contains__(self, name: object) -> bool:
        return any(row.available and row.name == name for row in self)

    def __getitem__(self, name):  # type: ignore[no-untyped-def]
        if isinstance(name, str):
            return {row.name: row for row in self}[name]
        return super().__getitem__(name)


def load(name: str) -> ModuleType:
    """The module of a backend, imported at its first use."""
    if name not in _loaded:
        _loaded[name] = importlib.import_module(MODULES[name])
    return _loaded[name]


def load_stats(name: str) -> ModuleType:
    """The module that computes a backend's token statistics."""
    return importlib.import_module(_STATS[name]) if name in _STATS else load(name)


def _missing(name: str) -> str | None:
    """Why a backend cannot be loaded at all, or None."""
    if name not in _loaded:
        if name == "triton" and importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if importlib.util.find_spec(MODULES[name]) is None:
            return f"{MODULES[name]} is missing from this installation"
    if name == "cpu":
        available, reason = load("cpu").available()
        return None if available else reason
    return None


def reasons_against(name: str, query: Tensor, branches: tuple[Branch, ...]) -> list[str]:
    """Every reason why the named backend cannot run the call."""
    missing = _missing(name)
    return [missing] if missing else load(name).unsupported_reasons(query, branches)


def _against_fast(name: str, query: Tensor) -> list[str]:
    """Every reason why the named backend does not multiply the call's queries and keys as INT8."""
    reasons = []
    if name not in FAST:
        reasons.append(f"precision='fast' is computed by {' and '.join(FAST)} only")
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"precision='fast' takes float16 and bfloat16, not {query.dtype}")
    return reasons


def refuse_gradients(
    call: str, query: Tensor, branches: tuple[Branch, ...], tensors: Sequence[Tensor]
) -> None:
    """Refuse a fast call that autograd would have to see.

    Raises:
        Unsupported: a tensor requires grad.
    """
    if any(x.requires_grad for x in tensors):
        raise Unsupported(
            f"{call}: precision='fast' has no gradients, and an input requires grad\n"
            f"  inputs: {describe_call(query, branches)}"
        )


def without_autocast(device: str) -> AbstractContextManager[object]:
    """How backends run: autocast off, where it is on."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def rounds_queries(name: str, query: Tensor) -> bool:
    """Whether a backend rounds a folded query before it meets the keys: only half precision is
    rounded, and the C++ kernels compute in fp32 but where the CPU multiplies bfloat16."""
    if query.dtype not in (torch.float16, torch.bfloat16) or name == "reference":
        return False
    return name != "cpu" or (query.dtype == torch.bfloat16 and "bf16" in load("cpu").isa())


def check_name(call: str, backend: object) -> None:
    """Refuse what is neither None nor the name of a backend."""
    if backend is not None and backend not in MODULES:
        names = ", ".join(MODULES)
        raise ValueError(f"{call}: backend must be one of {names} or None, got {backend!r}")


def _asked(backend: str | None, call: str) -> str | None:
    """The backend the caller or the environment names."""
    backend = backend or os.environ.get(ENVIRONMENT) or None
    check_name(call, backend)
    return backend


def arch_of(query: Tensor) -> str | None:
    """What `measured.TABLE` calls the hardware under a query: an architecture of the kernels, or
    the instruction set of the compiled ones; None where it has no name."""
    arch = None if _missing("triton") else load("triton").arch_of(query)
    if arch is None and query.device.type == "cpu" and not _missing("cpu"):
        arch = load("cpu").isa()
    return arch


def _order(query: Tensor, branches: tuple[Branch, ...]) -> tuple[str, ...]:
    """The backends to try: what was measured as fastest for such calls, then the device's usual."""
    usual = PREFERENCE.get(query.device.type, ("torch", "reference"))
    arch = arch_of(query) if TABLE else None
    if arch is None:
        return usual
    batch, heads, length, dim = query.shape
    longest = max((s.key.shape[2] for b in branches for s in b.segments), default=1)
    known = find(arch, query.dtype, dim, length, longest, batch * heads)
    return usual if known is None else (known.backend, *(n for n in usual if n != known.backend))


def resolve(
    call: str,
    query: Tensor,
    branches: tuple[Branch, ...],
    backend: str | None,
    fast: bool = False,
) -> str:
    """The backend that runs the call: the one asked for, else the first of the device's order that
    can; in a fast call the specification is no choice but by name.

    Raises:
        Unsupported: the asked backend cannot run the call; the message lists all reasons and the
            shapes.
    """
    asked = _asked(backend, call)
    order = (asked,) if asked else _order(query, branches)
    found: dict[str, list[str]] = {}
    for name in order:
        found[name] = reasons_against(name, query, branches)
        if fast:
            found[name] += _against_fast(name, query)
        if not found[name] and (asked or not fast or name != "reference"):
            return name
    lines = "".join(
        f"\n    {name}: {reason}" for name, reasons in found.items() for reason in reasons
    )
    raise Unsupported(
        f"{call}: backend {asked!r} cannot run the call:{lines}\n"
        f"  inputs: {describe_call(query, branches)}\n"
        "  pass backend='reference' to run it in eager PyTorch"
    )


def resolve_stats(call: str, x: Tensor, backend: str | None) -> str:
    """The backend that computes token statistics of x."""
    asked = _asked(backend, call)
    order: Sequence[str] = (
        (asked,) if asked else PREFERENCE.get(x.device.type, ("torch", "reference"))
    )
    for name in order:
        if not reasons_against(name, x, ()):
            return name
    reasons = "; ".join(reasons_against(order[0], x, ()))
    raise Unsupported(
        f"{call}: backend {asked!r} cannot run the call: {reasons}; inputs: {describe(x)}"
    )


def _detail(name: str) -> tuple[bool, str]:
    """Whether a backend can run on this machine, and what it runs on or why not."""
    missing = _missing(name)
    if missing:
        return False, missing
    if name == "reference":
        return True, "eager PyTorch, any device, up to float64"
    if name == "torch":
        return True, f"library attention of PyTorch {torch.__version__}, cpu" + (
            " and cuda" if torch.cuda.is_available() else ""
        )
    if name == "cpu":
        return True, f"C++, {load('cpu').isa()}"
    probe = torch.empty(1, 1, 1, 16, device="cuda" if torch.cuda.is_available() else "cpu")
    reasons = load(name).unsupported_reasons(probe, ())
    return not reasons, "; ".join(
        reasons
    ) or f"Triton on {torch.cuda.get_device_name() if probe.is_cuda else 'the interpreter'}"


def backends() -> Backends:
    """What can run here, and every reason why the others cannot. Prints as a table; `"cpu" in
    styleattn.backends()`."""
    return Backends(BackendStatus(name, *_detail(name)) for name in MODULES)
