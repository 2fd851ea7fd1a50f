"""Compile the launches of calls for GPUs that are not here, and read facts out of the machine code.

Run as a script, in a process without TRITON_INTERPRET: names of cases in, one JSON line each out.
A case is "KIND ARCH HEAD_DIM DTYPE [LENGTH]", say "shared sm_90 64 bfloat16".
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from styleattn.branch import Affine, Branch, Segment, normalize
from styleattn.kernels.attention import launch_of
from styleattn.kernels.stats import stats_launches

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class _Shapes:
    """Tensors of one call; their values do not matter."""

    def __init__(self, head_dim: int, dtype: torch.dtype, length: int):
        self.batch, self.heads, self.length, self.dim, self.dtype = 2, 2, length, head_dim, dtype

    def tokens(self, n: int | None = None, rows: int | None = None) -> torch.Tensor:
        n, rows = n or self.length, rows or self.batch
        x = torch.empty(rows, n, self.heads, self.dim, dtype=self.dtype)
        return x.transpose(1, 2)

    def affine(self, center: bool = True) -> Affine:
        shape = (self.batch, self.heads, self.dim)
        return Affine(*(torch.ones(shape) for _ in range(3 if center else 2)))


def _plain(x: _Shapes) -> tuple[Branch, ...]:
    return (Branch((Segment(x.tokens(), x.tokens()),)),)


def _shared(x: _Shapes, values: bool = False) -> tuple[Branch, ...]:
    """StyleAligned: every fold, a shift, row 0 is the reference."""
    key, value = x.tokens(), x.tokens()
    own = Segment(
        key, value, key_affine=x.affine(), value_affine=x.affine(False) if values else None
    )
    reference = Segment(
        key,
        value,
        rows=torch.tensor([-1, 0]),
        key_affine=x.affine(),
        logit_bias=0.7,
        logit_scale=1.1,
    )
    return (Branch((own, reference), query_affine=x.affine(False)),)


def _injected(x: _Shapes) -> tuple[Branch, ...]:
    """StyleID with blended keys and values."""
    style = Segment(
        x.tokens(rows=1),
        x.tokens(rows=1),
        logit_scale=torch.ones(x.batch),
        own_key=x.tokens(),
        own_value=x.tokens(),
        kv_blend=0.5,
    )
    return (Branch((style,), content_query=x.tokens(), gamma=0.75),)


def _joint(x: _Shapes) -> tuple[Branch, ...]:
    """Segments under one softmax, with a bias per query, a key mask and null keys."""
    n = x.length // 2
    queries = torch.zeros(x.batch, x.length)
    masked = Segment(x.tokens(n), x.tokens(n), key_bias=torch.zeros(x.batch, n), null_keys=4)
    biased = Segment(x.tokens(n), x.tokens(n), logit_bias=queries)
    return (Branch((Segment(x.tokens(), x.tokens()), biased, masked)),)


def _decoupled(x: _Shapes) -> tuple[Branch, ...]:
    text = Branch((Segment(x.tokens(77), x.tokens(77)),))
    image = Segment(x.tokens(4), x.tokens(4))
    return text, Branch((image,), weight=torch.ones(x.batch, x.length))


def _cross(x: _Shapes) -> tuple[Branch, ...]:
    """Too many keys for one tile."""
    text = Branch((Segment(x.tokens(77), x.tokens(77)),))
    return text, Branch((Segment(x.tokens(257), x.tokens(257)),), weight=0.5)


KINDS: dict[str, Callable[[_Shapes], tuple[Branch, ...]]] = {
    "plain": _plain,
    "shared": _shared,
    "shared-values": lambda x: _shared(x, values=True),
    "injected": _injected,
    "joint": _joint,
    "decoupled": _decoupled,
    "cross": _cross,
}


def launches(kind: str, arch: str, head_dim: int, dtype: torch.dtype, length: int) -> list[Any]:
    """The launches of a case."""
    shapes = _Shapes(head_dim, dtype, length)
    query = shapes.tokens()
    if kind == "stats":
        mean = torch.empty(shapes.batch, shapes.heads, head_dim)
        return stats_launches(query, 1e-5, mean, mean.clone())
    branches, scale = normalize("cross_compile", query, KINDS[kind](shapes), None)
    lse = torch.empty(len(branches), *query.shape[:3])
    return [launch_of(query, branches, scale, torch.empty_like(query), lse, arch)]


def build(launch: Any, arch: str) -> Any:
    """Compile a launch exactly as a device of that architecture would specialise it."""
    backend = make_backend(TARGETS[arch])
    function, given = launch.kernel, {**launch.constants, **launch.options}
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = bind(*launch.args, **given, debug=False)
    options, signature, constants, attributes = function._pack_args(
        backend, given, bound, specialization, {}
    )
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[arch], options=options.__dict__)


def _loops(listing: str) -> list[list[tuple[str, str]]]:
    """The innermost loops of a disassembly, as lists of (opcode, operands)."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    spans = []
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            labels[found.group(1)] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append((found.group(1), found.group(2)))
    for at, (opcode, operands) in enumerate(code):
        found = _TARGET.search(operands) if opcode.startswith("BRA") else None
        if found and labels.get(found.group(1), at + 1) <= at:
            spans.append((labels[found.group(1)], at))
    inner = [
        (a, b) for a, b in spans if not any(a <= c and d <= b for c, d in spans if (c, d) != (a, b))
    ]
    return [code[a : b + 1] for a, b in inner]


def _overlap(loop: list[tuple[str, str]]) -> int:
    """How many exponentials run between the issue of matrix products and the wait for them."""
    count, pending, turn = 0, None, len(loop)
    for at, (opcode, _) in enumerate(loop * 2):
        if opcode.startswith("HGMMA") and pending is None:
            pending = 0
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            count += pending or 0 if at >= turn else 0
            pending = None
        elif opcode.startswith("MUFU.EX2") and pending is not None:
            pending += 1
    return count


def _nvidia_facts(kernel: Any, arch: str) -> dict[str, Any]:
    """Registers, stack, and the hot loops: those with exponentials and tensor-core products."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        listing = subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], **run).stdout
        usage = subprocess.run([_TOOLS / "cuobjdump", "-res-usage", file.name], **run).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says {usage!r}")
    hot = []
    for loop in _loops(listing):
        opcodes = [opcode for opcode, _ in loop]
        exponentials = sum(o.startswith("MUFU.EX2") for o in opcodes)
        products = sum(o.startswith((TENSOR_CORES[arch], "FFMA")) for o in opcodes)
        if exponentials < 4 or not products:
            continue
        spills = sum(o.startswith(("LDL", "STL")) for o in opcodes)
        fact = {"instructions": len(loop), "exponentials": exponentials, "spills": spills}
        hot.append({**fact, "overlap": _overlap(loop)})
    return {
        "registers": int(found.group(1)),
        "stack": int(found.group(2)),
        "products": listing.count(TENSOR_CORES[arch]),
        "loops": hot,
    }


def _amd_facts(kernel: Any) -> dict[str, Any]:
    assembly = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count"),
        "stack": number("private_segment_fixed_size"),
        "products": len(re.findall(r"^\s+v_mfma", assembly, re.M)),
        "loops": [],
    }


def facts(case: str) -> dict[str, Any]:
    """What the machine code of a case says, per launch the worst."""
    kind, arch, head_dim, dtype, *rest = case.split()
    length = int(rest[0]) if rest else 1024
    found = []
    for launch in launches(kind, arch, int(head_dim), getattr(torch, dtype), length):
        kernel = build(launch, arch)
        fact = _amd_facts(kernel) if arch == "gfx942" else _nvidia_facts(kernel, arch)
        blocks = {k: v for k, v in launch.constants.items() if k.startswith(("BLOCK", "COLUMNS"))}
        shared = kernel.metadata.shared
        found.append({**fact, "shared": shared, **blocks, **launch.options})
    return {"case": case, "launches": found}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(facts(name)), flush=True)
