"""The gate that needs no GPU: every launch that can be chosen, compiled for GPUs that are not here.

    python benchmarks/static_gate.py            check all cases against the stored baseline
    python benchmarks/static_gate.py CASE ...   some of them; prints their facts
    python benchmarks/static_gate.py --update   store a new baseline: the diff is the review

A case is "KIND ARCH HEAD_DIM DTYPE [LENGTH]", say "shared sm_90 64 bfloat16". Run it in a process
without TRITON_INTERPRET. What is checked: shared memory and registers fit, half precision runs on
the matrix units and spills nothing in a hot loop, a turn of it has exactly the products of one step
(2 * BLOCK_M * BLOCK_N * D multiply-adds; half of that in the loop that stands in where logits are
not bounded, and where keys have a bias each), on sm_90 products are not waited for one by one and
at least half of the exponentials of every loop run while products are under way, INT8 is multiplied
as such, and neither the overlap nor the instructions per score are 3 % worse than the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from machine_code import read
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from styleattn.branch import Affine, Branch, Segment, normalize
from styleattn.kernels import attention, configs, primitives
from styleattn.kernels.attention import launch_of
from styleattn.kernels.configs import ARCHITECTURES, high_width, low_width
from styleattn.kernels.norms import group_norm_launches, rotary_launch
from styleattn.kernels.quantised import quantised_width
from styleattn.kernels.stats import stats_launches

BASELINE = Path(__file__).parent / "results" / "static-gate.json"
TOLERANCE = 1.03
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB
LANES = {"gfx942": 64}
STREAMING = (
    "stats",
    "rotary",
    "group-norm",
    "group-norm-last",
    "reach",
    "quantise",
    "blend",
)  # no products, no hot loop
WAITS = 3  # of a turn on sm_90: for the products with two chunks of keys, and with values


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


_CALLS = {"reach": "plain", "quantise": "plain", "blend": "injected"}
"""Launches before that of the attention, and a call that has each."""


def _group_norm(channels: int, dtype: torch.dtype, positions: int, last: bool) -> list[Any]:
    """GroupNorm of 32 groups shared with one reference row; row 0 is the reference."""
    x = torch.empty(2, channels, positions, dtype=dtype)
    if last:
        x = torch.empty(2, positions, channels, dtype=dtype).transpose(1, 2)
    rows, keep = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int8)
    gain, out = torch.empty(channels, dtype=dtype), torch.empty_like(x)
    rest = (gain, gain, 1e-5, True, x, keep, out)
    return group_norm_launches(x, 32, rows, torch.ones(1), *rest)


def launches(kind: str, arch: str, head_dim: int, dtype: torch.dtype, length: int) -> list[Any]:
    """The launches of a case."""
    shapes = _Shapes(head_dim, dtype, length)
    query = shapes.tokens()
    if kind == "stats":
        mean = torch.empty(shapes.batch, shapes.heads, head_dim)
        return stats_launches(query, 1e-5, mean, mean.clone())
    if kind == "rotary":
        affine, angles = shapes.affine(False), torch.ones(length, head_dim)
        pair = (affine.scale, affine.shift)
        weight, out = torch.empty(head_dim, dtype=dtype), torch.empty_like(query)
        return [rotary_launch(query, weight, 1e-6, pair, (angles, angles), None, out)]
    if kind.startswith("group-norm"):
        return _group_norm(head_dim, dtype, length, last=kind.endswith("last"))
    fast = kind.endswith("-int8") or kind == "quantise"
    made = KINDS[_CALLS.get(kind, kind.removesuffix("-int8"))](shapes)
    branches, scale = normalize("cross_compile", query, made, None)
    lse = torch.empty(len(branches), *query.shape[:3])
    launch = launch_of(query, branches, scale, torch.empty_like(query), lse, arch, fast)
    return [launch.before[-1]] if kind in _CALLS else [launch]


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


def facts(case: str) -> list[dict[str, Any]]:
    """What the machine code of a case says, per launch."""
    kind, arch, head_dim, dtype, *rest = case.split()
    length = int(rest[0]) if rest else 1024
    found = []
    for launch in launches(kind, arch, int(head_dim), getattr(torch, dtype), length):
        kernel = build(launch, arch)
        warps = launch.options["num_warps"]
        code = read(kernel, arch, warps)
        blocks = {k: v for k, v in launch.constants.items() if k.startswith(("BLOCK", "COLUMNS"))}
        fact = {**asdict(code), "shared": kernel.metadata.shared, **blocks, **launch.options}
        if kind not in (*STREAMING, "decoupled"):
            scores = blocks["BLOCK_M"] * blocks["BLOCK_N"]
            width = low_width(int(head_dim)) + high_width(int(head_dim))
            keys = quantised_width(int(head_dim)) if kind.endswith("-int8") else width
            each = [loop.products / (scores * (keys + width)) for loop in code.loops]
            per = scores / (LANES.get(arch, 32) * warps)
            if dtype == "float32":  # two at a time on some: no count of them says what a turn has
                each = [1.0] * len(each)
            fact["steps"] = each
            bounded = dtype == "bfloat16" and configs.is_bounded(arch, int(head_dim))
            bounded &= not kind.endswith("-int8")
            fact["turns"] = (1, 0.5) if bounded or kind == "joint" else (1,)
            fact["measures"] = [
                [
                    round(loop.instructions / (per * min(steps, 1.0) if steps else per), 3),
                    round(loop.overlap / loop.exponentials, 3),
                ]
                for loop, steps in zip(code.loops, each, strict=True)
            ]
        found.append(fact)
    return found


def faults(
    case: str, found: list[dict[str, Any]], stored: list[list[list[float]]] | None
) -> list[str]:
    """Every reason why a case must not ship.

    Args:
        found: its facts.
        stored: the baseline: per launch and loop the instructions per score, and the share of the
            exponentials that overlap with products; None for none.
    """
    kind, arch, _, dtype, *_ = case.split()
    half = kind not in STREAMING and dtype != "float32"
    reasons = []
    for number, fact in enumerate(found):
        if fact["shared"] > SHARED_MEMORY[arch] * 1024:
            reasons.append(f"{fact['shared']} bytes of shared memory")
        if fact["registers"] > (512 if arch == "gfx942" else 255) or fact["spilled"]:
            reasons.append(f"{fact['registers']} registers, {fact['spilled']} spilled")
        if kind in STREAMING and fact["stack"]:
            reasons.append(f"{fact['stack']} bytes of stack")
        if half and not fact["matrix"]:
            reasons.append("no matrix units")
        if kind.endswith("-int8") != bool(fact["integer"]):
            reasons.append(f"{fact['integer']} products of INT8")
        for loop, steps in zip(fact["loops"], fact.get("steps", []), strict=False):
            if half and loop["spills"]:
                reasons.append(f"{loop['spills']} spills in a hot loop")
            if half and loop["products"] and steps not in fact["turns"]:
                reasons.append(f"a turn has the products of {steps:g} steps")
            if half and arch == "sm_90":
                if loop["waits"] > WAITS:
                    reasons.append(f"a turn waits {loop['waits']} times for products")
                share = loop["overlap"] / loop["exponentials"]
                if share < 0.5:
                    reasons.append(f"{share:.0%} of the exponentials overlap with products")
        now = fact.get("measures", [])
        before = now if stored is None else stored[number]
        if len(now) != len(before):
            reasons.append(f"{len(now)} hot loops, the baseline has {len(before)}")
        for (cost, share), (least, most) in zip(now, before, strict=False):
            if cost > TOLERANCE * least:
                reasons.append(f"{cost} instructions per score, the baseline has {least}")
            if share * TOLERANCE < most:
                reasons.append(
                    f"{share:.0%} of the exponentials overlap, the baseline has {most:.0%}"
                )
    return reasons


def cases() -> Iterator[str]:
    """Every launch configuration that can be chosen, by a call that chooses it."""
    for arch in ARCHITECTURES:
        for dim in (64, 128, 160, 256):
            yield f"plain {arch} {dim} bfloat16"
            yield f"plain {arch} {dim} float32"
        for dim in (40, 64, 80, 128, 160):
            yield f"shared {arch} {dim} bfloat16"
            if arch in configs.BOUNDED:  # with a running maximum
                yield f"shared {arch} {dim} float16"
            if configs.is_quantised(arch, dim):
                yield f"shared-int8 {arch} {dim} bfloat16"
        for kind in ("shared-values", "injected", "joint"):
            yield f"{kind} {arch} 64 float16 1000"
            for dim in (64, 128) if arch in configs.BOUNDED else ():
                yield f"{kind} {arch} {dim} bfloat16"
        for dim in (40, 80, 160) if arch in configs.BOUNDED else ():
            yield f"joint {arch} {dim} bfloat16"
            yield f"cross {arch} {dim} bfloat16"
        yield from (f"cross {arch} {dim} bfloat16" for dim in (64, 128))
        yield f"joint {arch} 64 bfloat16 512"  # masked keys that no launch before cleans
        yield f"plain {arch} 64 bfloat16 64"  # few queries
        yield f"plain {arch} 64 bfloat16 20"  # few keys
        yield from (f"decoupled {arch} {dim} float16" for dim in (64, 160))
        yield f"decoupled {arch} 64 float32"
        yield f"stats {arch} 64 bfloat16"
        if arch in configs.BOUNDED:
            yield f"reach {arch} 128 bfloat16"
        if configs.is_quantised(arch, 64):
            yield f"quantise {arch} 64 bfloat16"
        yield f"blend {arch} 64 bfloat16"
        yield f"rotary {arch} 128 bfloat16"
        yield f"group-norm {arch} 320 bfloat16 16384"
        yield f"group-norm-last {arch} 1280 float16 1000"


def _warps() -> None:
    """Half the warps for the same tile: more registers than there are."""
    for key, tiles in configs.TILES.items():
        configs.TILES[key] = tuple(
            configs.Tile(t.block_m, t.block_n, max(1, t.warps // 2), t.stages) for t in tiles
        )  # type: ignore[assignment]


def _twice() -> None:
    """The first chunk of Q K^T is multiplied twice."""
    _rewrite(primitives.dot_qk, "    return s", "    return tl.dot(q[0], tl.trans(k[0]), s)")


def _unrotated() -> None:
    """The products of the next step are issued after the exponentials of this one."""
    issue = "            s = _products(early, q, segment, row, h, at, n, None, D)\n"
    look = "            level = _scale(scale, segment, row, h, at)\n"
    _rewrite(attention._attend, issue, "")
    _rewrite(attention._attend, look, issue + look)


def _unsettled() -> None:
    """The products with values are left under way across the wait for the first chunk of keys."""
    _rewrite(primitives.settled, "if INTERPRETED:", "if True:")


SPOILS: dict[str, Callable[[], None]] = {
    "warps": _warps,
    "twice": _twice,
    "unrotated": _unrotated,
    "unsettled": _unsettled,
}
"""Deliberate damage, by name: the gate must refuse each."""


def _rewrite(function: Any, old: str, new: str) -> None:
    if function.src.count(old) != 1:
        raise ValueError(f"{function.__name__} does not have once: {old!r}")
    function._unsafe_update_src(function.src.replace(old, new))


def stored() -> dict[str, list[list[list[float]]]]:
    """The baseline of this version of Triton, by case; empty where there is none."""
    if not BASELINE.is_file():
        return {}
    found = json.loads(BASELINE.read_text())
    return found["cases"] if found["triton"] == triton.__version__ else {}


def _checked(case: str) -> tuple[str, list[dict[str, Any]], list[str]]:
    found = facts(case)
    return case, found, faults(case, found, stored().get(case))


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--json", action="store_true", help="the facts of each case, one per line")
    parser.add_argument("--spoil", choices=sorted(SPOILS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    values = parser.parse_args(arguments)
    if values.spoil:
        SPOILS[values.spoil]()
    chosen, refused, baseline = values.cases or list(cases()), 0, dict(stored())
    with ProcessPoolExecutor(1 if values.spoil else values.processes) as pool:
        for case, found, reasons in (map if values.spoil else pool.map)(_checked, chosen):
            baseline[case] = [fact.get("measures", []) for fact in found]
            refused += bool(reasons)
            if values.json:
                print(json.dumps({"case": case, "facts": found, "faults": reasons}), flush=True)
            else:
                loops = ", ".join(str(x) for launch in baseline[case] for x, _ in launch) or "-"
                print(f"{case:36} {loops:20} {'; '.join(reasons) or 'ok'}", flush=True)
    if values.update:
        lines = ",\n".join(f" {json.dumps(c)}: {json.dumps(m)}" for c, m in baseline.items())
        head = f'"triton": {json.dumps(triton.__version__)}'
        BASELINE.write_text(f'{{{head}, "cases": {{\n{lines}\n}}}}\n')
        return 0
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
