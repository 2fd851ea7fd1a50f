"""Rows of results: what one holds, what this machine is called, and the CSV of each machine."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

import styleattn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_INTEL = {0x55: "skylake", 0x6A: "icelake", 0x8F: "sapphirerapids", 0xCF: "emeraldrapids"}


@dataclass(frozen=True)
class Row:
    """One contestant on one shape. Fields that were not measured are empty.

    `status` is "ok", or "FAILED: why" for a contestant whose result is wrong (it has no time).
    `spread` is the interquartile range over the median; `error` is relative to fp64 and `budget`
    its limit; `gflops` is of the exact algorithm, at the median; `peak_mib` is memory that the
    call held beyond what was there.
    """

    size: str
    clock: str
    threads: int
    dtype: str
    shape: str
    provider: str
    group: str
    kind: str
    batch: int
    heads: int
    length: int
    head_dim: int
    keys: str
    references: int
    shift: float
    status: str
    median_ms: float | None
    min_ms: float | None
    spread: float | None
    rounds: int
    error: float
    budget: float
    peak_mib: float | None
    flops_exact: int
    flops_official: int
    bytes: int
    gflops: float | None
    isa: str
    device: str
    torch: str
    triton: str
    styleattn: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        """What a later measurement replaces."""
        parts = (self.size, self.clock, self.threads, self.dtype, self.shape, self.provider)
        return tuple(str(part) for part in parts)


@dataclass(frozen=True)
class StepRow:
    """One contestant at one step of a whole denoiser. Fields that were not measured are empty.

    `route` is "plain", "official" or "ours"; `tax` is the time over the plain step's; `error` is
    ours against the official route, relative, on the same inputs, and `budget` its limit.
    """

    size: str
    mode: str
    threads: int
    dtype: str
    model: str
    method: str
    route: str
    batch: int
    status: str
    median_ms: float | None
    min_ms: float | None
    spread: float | None
    rounds: int
    tax: float | None
    error: float | None
    budget: float | None
    peak_mib: float | None
    parameters: int
    isa: str
    device: str
    torch: str
    triton: str
    styleattn: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        """What a later measurement replaces."""
        parts = (self.size, self.mode, self.threads, self.dtype, self.model)
        return tuple(str(part) for part in (*parts, self.method, self.route, self.batch))


AnyRow = TypeVar("AnyRow", Row, StepRow)


def _written(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(kind: str, text: str) -> object:
    if text == "" and "None" in kind:
        return None
    return int(text) if kind == "int" else float(text) if kind.startswith("float") else text


@overload
def load(path: Path) -> list[Row]: ...
@overload
def load(path: Path, kind: type[AnyRow]) -> list[AnyRow]: ...
def load(path: Path, kind: Any = Row) -> Any:
    """The rows of a CSV, of a kind; none if there is no file.

    Raises:
        ValueError: its columns are not those of the kind.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(types):
            raise ValueError(f"{path.name} has other columns than {', '.join(types)}")
        return [kind(**{n: _read(types[n], text) for n, text in row.items()}) for row in reader]


def save(path: Path, rows: Iterable[AnyRow], kind: type[AnyRow] = Row) -> None:  # type: ignore[assignment]
    """Add rows of a kind to a CSV; a row replaces the one with the same key, where that stood."""
    kept = {row.key: row for row in load(path, kind)}
    kept |= {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    with draft.open("w", newline="", encoding="utf-8") as file:
        names = [field.name for field in fields(kind)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in kept.values():
            writer.writerow({name: _written(value) for name, value in asdict(row).items()})
    draft.replace(path)


def _number(cpuinfo: str, field: str) -> int:
    found = re.search(rf"^{field}\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    return int(found[1]) if found else -1


def architecture(cpuinfo: str) -> str:
    """The microarchitecture that a Linux cpuinfo describes, or an empty string."""
    family, model = _number(cpuinfo, "cpu family"), _number(cpuinfo, "model")
    if "AuthenticAMD" in cpuinfo:
        zen4 = model in range(0x10, 0x20) or model in range(0x60, 0x80) or model >= 0xA0
        names = {23: "zen" if model < 0x30 else "zen2", 25: "zen4" if zen4 else "zen3", 26: "zen5"}
        return names.get(family, "")
    if "GenuineIntel" in cpuinfo and family == 6:
        return _INTEL.get(model, f"model{model}")
    return ""


def processor(cpuinfo: str, cores: int) -> str:
    """A CPU's name for a file: model, microarchitecture and number of cores, nothing else."""
    found = re.search(r"^model name\s*:\s*(.+)", cpuinfo, re.MULTILINE)
    name = found[1] if found else platform.machine()
    name = re.sub(r"\((r|tm)\)|@.*|\d+-core|processor|cpu", " ", name.lower())
    parts = (*re.findall(r"[a-z0-9]+", name), architecture(cpuinfo), f"{cores}c")
    return "-".join(part for part in parts if part)


def machine(device: torch.device) -> str:
    """The name of the CPU or GPU that does the work, never that of a host."""
    if device.type == "cuda":
        return "-".join(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    info = Path("/proc/cpuinfo")
    return processor(info.read_text(encoding="utf-8") if info.exists() else "", os.cpu_count() or 1)


def isa(device: torch.device) -> str:
    """The instruction set of our kernels, or the GPU's compute capability."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    status = styleattn.backends()["cpu"]
    if status.available:
        return status.detail.rpartition(", ")[2]
    return torch.backends.cpu.get_cpu_capability().lower()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that is measured; a plus sign where the code it is measured on differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    code = ["styleattn", "kernels", "csrc"]
    changed = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", *code]
    differs = subprocess.run(changed, capture_output=True, text=True).stdout.strip()
    return found.stdout.strip() + ("+" if differs else "")


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where and when."""
    return {
        "isa": isa(device),
        "device": device.type,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "styleattn": styleattn.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
