"""What the machine code of a kernel says: registers, spills, and the hot loops with their products,
exponentials and instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TENSOR_CORES = {
    "sm_80": ("HMMA", "IMMA"),
    "sm_89": ("HMMA", "IMMA"),
    "sm_90": ("HGMMA", "IGMMA"),
    "sm_100": ("UTCHMMA", "UTCIMMA"),
}
"""Opcodes of the matrix units: half precision, INT8."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_NVIDIA_CODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)")
_NVIDIA_LABEL = re.compile(r"^(\.L_x_\d+):")
_NVIDIA_JUMP = re.compile(r"`\((\.L_x_\d+)\)")
_AMD_CODE = re.compile(r"^\s+([a-z]\w+)(.*)")
_AMD_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_AMD_JUMP = re.compile(r"(\.LBB\d+_\d+)\s*$")
_WAIT = "WARPGROUP.DEPBAR"
_WARPS = 4  # of a warp group

Instruction = tuple[str, str]


@dataclass(frozen=True)
class Loop:
    """An innermost loop with exponentials and products.

    Args:
        instructions: per warp and turn.
        exponentials: of them.
        products: multiply-adds of the matrix units per program and turn; 0 where the opcode does
            not tell (sm_100), and for fp32 those of the ordinary cores.
        spills: loads and stores of registers that did not fit.
        overlap: exponentials between the issue of products and the wait for them (sm_90).
        waits: for products (sm_90).
    """

    instructions: int
    exponentials: int
    products: int
    spills: int
    overlap: int
    waits: int


@dataclass(frozen=True)
class Code:
    """A compiled kernel: registers per thread, bytes of stack, spilled registers where the compiler
    says so, opcodes of the matrix units and those of them that are INT8, hot loops."""

    registers: int
    stack: int
    spilled: int
    matrix: int
    integer: int
    loops: tuple[Loop, ...]


def read(kernel: Any, arch: str, warps: int) -> Code:
    """The facts of a compiled kernel."""
    return _amd(kernel, warps) if arch.startswith("gfx") else _nvidia(kernel, arch, warps)


def _innermost(
    lines: Iterable[str], code: re.Pattern[str], label: re.Pattern[str], jump: re.Pattern[str]
) -> list[list[Instruction]]:
    """Runs of instructions that end in a jump back to their start and hold no other such run."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    spans = []
    for line in lines:
        if here := label.match(line):
            labels[here.group(1)] = len(found)
        elif here := code.match(line):
            found.append((here.group(1), here.group(2)))
    for at, (opcode, operands) in enumerate(found):
        target = jump.search(operands) if opcode.startswith(("BRA", "s_cbranch")) else None
        if target and labels.get(target.group(1), at + 1) <= at:
            spans.append((labels[target.group(1)], at))
    inner = [
        (a, b) for a, b in spans if not any(a <= c and d <= b for c, d in spans if (c, d) != (a, b))
    ]
    return [found[a : b + 1] for a, b in inner]


def _overlap(loop: list[Instruction]) -> int:
    """How many exponentials run between the issue of matrix products and the wait for them."""
    count, pending, turn = 0, None, len(loop)
    for at, (opcode, _) in enumerate(loop * 2):
        if opcode.startswith(TENSOR_CORES["sm_90"]) and pending is None:
            pending = 0
        elif opcode.startswith(_WAIT):
            count += pending or 0 if at >= turn else 0
            pending = None
        elif opcode.startswith("MUFU.EX2") and pending is not None:
            pending += 1
    return count


def _products(opcode: str, warps: int) -> int:
    """Multiply-adds of one instruction, over all warps of the program."""
    if found := re.match(r"[HI]GMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, found.groups())
        return m * n * k * (warps // _WARPS)
    if found := re.match(r"IMMA\.(\d+)\.", opcode):
        return {"16832": 16 * 8 * 32, "16816": 16 * 8 * 16}[found.group(1)] * warps
    if opcode.startswith("HMMA.16816"):
        return 16 * 8 * 16 * warps
    if opcode.startswith("HMMA.1688"):
        return 16 * 8 * 8 * warps
    if found := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, found.groups())
        return m * n * k * warps
    if opcode == "FFMA":
        return 32 * warps
    return 0


def _nvidia(kernel: Any, arch: str, warps: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        listing = subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], **run).stdout
        usage = subprocess.run([_TOOLS / "cuobjdump", "-res-usage", file.name], **run).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says {usage!r}")
    unit = TENSOR_CORES[arch]
    hot = []
    for loop in _innermost(listing.splitlines(), _NVIDIA_CODE, _NVIDIA_LABEL, _NVIDIA_JUMP):
        opcodes = [opcode for opcode, _ in loop]
        exponentials = sum(o.startswith("MUFU.EX2") for o in opcodes)
        if exponentials < 4 or not any(o.startswith((*unit, "FFMA")) for o in opcodes):
            continue
        on_unit = [o for o in opcodes if o.startswith(unit)]
        products = sum(_products(o, warps) for o in on_unit or opcodes)
        spills = sum(o.startswith(("LDL", "STL")) for o in opcodes)
        waits = sum(o.startswith(_WAIT) for o in opcodes)
        hot.append(Loop(len(loop), exponentials, products, spills, _overlap(loop), waits))
    return Code(
        int(found.group(1)),
        int(found.group(2)),
        0,
        sum(map(listing.count, unit)),
        listing.count(unit[1]),
        tuple(hot),
    )


def _amd(kernel: Any, warps: int) -> Code:
    assembly = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    hot = []
    for loop in _innermost(assembly.splitlines(), _AMD_CODE, _AMD_LABEL, _AMD_JUMP):
        opcodes = [opcode for opcode, _ in loop]
        exponentials = sum(o.startswith("v_exp_f32") for o in opcodes)
        products = sum(_products(o, warps) for o in opcodes)
        if exponentials < 4 or not products:
            continue
        spills = sum(o.startswith(("scratch_", "buffer_store_dword_off")) for o in opcodes)
        hot.append(Loop(len(loop), exponentials, products, spills, 0, 0))
    matrix = len(re.findall(r"^\s+v_mfma", assembly, re.M))
    integer = len(re.findall(r"^\s+v_mfma_i32", assembly, re.M))
    stack = number("private_segment_fixed_size")
    spilled = number("vgpr_spill_count") if stack else 0  # else from one register file to the other
    return Code(number("vgpr_count"), stack, spilled, matrix, integer, tuple(hot))
