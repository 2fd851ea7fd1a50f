"""The microbenchmarks themselves: a registry that counts right, a gate that notices, rows that keep
their place. No time is looked at."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import styleattn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import measure  # noqa: E402
import pages  # noqa: E402
import plot  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402
from cases import Case  # noqa: E402
from formulations import FORMULATIONS  # noqa: E402
from providers import PROVIDERS, Provider  # noqa: E402
from shapes import KINDS, SHAPES, SIZES, Shape  # noqa: E402
from timing import clocks, interleaved, summary  # noqa: E402

ZEN3 = """vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7763 64-Core Processor
"""
EAGER = ("ours-cpu", "ours-torch", "ours-reference", "ours-auto", "official", "sdpa")


def _seen_scores(shape: Shape) -> int:
    """Scores of the exact algorithm, counted query by query from what `ours` hands the library."""
    case = Case.draw(shape.at("tiny"), torch.float32)
    p = case.problem
    counted = []
    attend = styleattn._ops.attention

    def counting(query, branches, *rest):
        for branch in branches:
            for s in branch.segments:
                rows = range(p.batch) if s.rows is None else s.rows.tolist()
                served = sum(r >= 0 for r in rows)
                counted.append(served * query.shape[2] * s.key.shape[2])
        return attend(query, branches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(styleattn._ops, "attention", counting)
        case.ours("reference")
    return sum(counted)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_flops_are_those_of_the_exact_and_the_official_algorithm(shape: Shape) -> None:
    case = Case.draw(shape.at("tiny"), torch.float32)
    p = case.problem
    assert p.flops_exact == 4 * p.heads * p.head_dim * _seen_scores(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.official()
    # the counter knows no CPU flash kernel: count the products that SDPA is made of
    products = counter.get_total_flops() or sum(
        4 * a.query.shape[0] * p.heads * p.length * a.key.shape[2] * p.head_dim
        for a in case.materialised()
    )
    assert p.flops_official == products >= p.flops_exact


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_registry_is_sane(shape: Shape) -> None:
    assert shape.kind in KINDS and set(KINDS) == set(FORMULATIONS)
    real, cpu, tiny = (shape.at(size) for size in SIZES)
    assert tiny.flops_exact <= cpu.flops_exact <= real.flops_exact
    assert real.head_dim == cpu.head_dim == tiny.head_dim
    for p in (real, cpu, tiny):
        if p.kind == "biased":
            assert sum(p.keys) == p.length
    case = Case.draw(tiny, torch.float32)
    features = [x for x in case.tensors.values() if x.ndim == 4 and x.shape[-1] == p.head_dim]
    held = {n: x for n, x in case.tensors.items() if "mean" not in n and "std" not in n}
    held = [x for x in held.values() if any(x is f for f in features)]
    assert tiny.bytes_moved(4) == 4 * (sum(x.numel() for x in held) + case.exact.numel())
    assert all(x.stride(-1) == 1 and x.stride(1) == p.head_dim for x in held)


def test_registry_has_what_was_asked_for() -> None:
    dims = {(s.real[2], s.real[1], s.head_dim) for s in SHAPES.values()}
    assert {(4096, 10, 64), (1024, 20, 64), (4096, 8, 40), (1024, 8, 80), (256, 8, 160)} <= dims
    assert {(4608, 24, 128), (5337, 24, 128), (4096, 16, 128)} <= dims
    keys = {s.keys for s in SHAPES.values()}
    assert {(77, 4), (77, 16), (77, 4, 4, 4), (77, 4, 32), (32,), (512, 729, 4096)} <= keys
    assert {s.references for s in SHAPES.values() if s.kind == "bank"} == {1, 2, 3, 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_providers_agree_with_fp64(name: str, dtype: torch.dtype) -> None:
    case = Case.draw(SHAPES[name].at("tiny"), dtype)
    with torch.no_grad():
        for provider in (PROVIDERS[n] for n in EAGER):
            if not provider.reasons(case):
                contestant = measure.admit(provider, case)
                assert contestant.run is not None, f"{provider.name}: {contestant.failed}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["official-compiled", "flex"])
def test_compiled_providers_agree_with_fp64(name: str) -> None:
    case = Case.draw(SHAPES["sdxl-1024-shared-b4-shift"].at("tiny"), torch.float32)
    if reasons := PROVIDERS[name].reasons(case):
        pytest.skip("; ".join(reasons))
    with torch.no_grad():
        assert measure.admit(PROVIDERS[name], case).failed == ""


@pytest.mark.parametrize("kind", KINDS)
def test_exact_result_is_the_specification(kind: str) -> None:
    """The fp64 yardstick shares no code with the library; they agree all the same."""
    shape = next(s for s in SHAPES.values() if s.kind == kind)
    case = Case.draw(shape.at("tiny"), torch.float64)
    assert case.error(case.ours("reference")) < 1e-6  # statistics are fp32


def _wrong(name: str, run) -> Provider:
    return Provider(name, lambda case: lambda: run(case), lambda case: [], "library")


@pytest.mark.parametrize(
    ("run_wrong", "why"),
    [
        (lambda c: c.official() * 1.02, "above the budget"),
        (lambda c: c.official().masked_fill(c.tensors["query"] > 2, float("nan")), "budget"),
        (lambda c: c.official().double(), "float64"),
        (lambda c: c.official()[:, :, 1:], "20, 64"),
        (lambda c: c.ours("no such backend"), "must be one of"),
        # StyleAligned without AdaIN: what a plain random key would hide
        (
            lambda c: styleattn.shared_attention(
                *(c.tensors[n] for n in ("query", "key", "value")),
                reference_rows=[0, 0, 2, 2],
                adain_keys=False,
            ),
            "above the budget",
        ),
    ],
)
def test_gate_catches_wrong_results(run_wrong, why: str) -> None:
    problem = SHAPES["sdxl-1024-shared-b4"].at("tiny")
    found = measure.measure(
        problem, torch.float32, [_wrong("wrong", run_wrong), PROVIDERS["official"]], rounds=2
    )
    wrong, right = found.rows
    assert wrong.provider == "wrong" and why in wrong.status and wrong.status.startswith("FAILED")
    assert wrong.median_ms is wrong.gflops is wrong.min_ms is None
    assert right.status == "ok" and right.median_ms > 0 and right.error < right.budget


def test_rows_are_kept_by_key(tmp_path: Path) -> None:
    path = tmp_path / "machine.csv"
    problem = SHAPES["sd15-256"].at("tiny")
    rows = measure.measure(problem, torch.float32, [PROVIDERS["official"]], rounds=2).rows
    results.save(path, rows)
    other = [replace(rows[0], dtype="bfloat16"), replace(rows[0], provider="ours-cpu")]
    results.save(path, other)
    results.save(path, [replace(rows[0], median_ms=1.0, status="ok", peak_mib=None)])
    kept = results.load(path)
    assert [row.key for row in kept] == [row.key for row in (*rows, *other)]
    assert kept[0].median_ms == 1.0 and kept[0].peak_mib is None
    assert path.read_text().count("\n") == 4
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="other columns"):
        results.load(path)


def test_machine_is_a_processor_never_a_host() -> None:
    assert results.processor(ZEN3, 2) == "amd-epyc-7763-zen3-2c"
    assert results.architecture(ZEN3.replace("25", "26")) == "zen5"
    intel = ZEN3.replace("AuthenticAMD", "GenuineIntel").replace(": 25", ": 6")
    assert results.architecture(intel.replace(": 1\n", ": 143\n")) == "sapphirerapids"
    name = results.machine(torch.device("cpu"))
    node = Path("/etc/hostname")
    assert not node.exists() or node.read_text().strip() not in name


def test_clocks_and_order() -> None:
    seen: list[tuple[str, int]] = []
    samplers = {n: lambda i, n=n: seen.append((n, i)) or 1.0 + i for n in "ab"}
    taken = interleaved(samplers, rounds=3)
    assert "".join(n for n, _ in seen) == "abbaab"
    assert taken["a"].median_ms == 2.0 and taken["a"].min_ms == 1.0 and taken["a"].rounds == 3
    assert summary([3.0]).spread == 0.0
    with pytest.raises(ValueError, match="one thread"):
        clocks(torch.device("cpu"), ["cpu-time"], [2])
    with pytest.raises(ValueError, match="cannot time"):
        clocks(torch.device("cpu"), ["graph"])


def test_command_line_measures_saves_and_draws(tmp_path: Path) -> None:
    csv = tmp_path / "machine.csv"
    asked = ["--shapes", "sd15-256*", "--providers", "sdpa", "ours-torch", "official"]
    asked += ["--size", "tiny", "--rounds", "2", "--dtype", "float32", "--output", str(csv)]
    limits, measure.GEMM = measure.GEMM, {"cpu": 64, "cuda": 64}
    try:
        assert run.main(asked) == 0
    finally:
        measure.GEMM = limits
    rows = results.load(csv)
    assert {row.provider for row in rows} == {"sdpa", "ours-torch", "official", "torch"}
    assert all(row.commit and row.date and row.torch and row.isa for row in rows)
    table = plot.draw(csv, tmp_path)
    assert table.count("\n") == 4 and "sd15-256-shared-b4-shift" in table
    assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".svg"}
    assert any(p.name.startswith("roofline") for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["--shapes", "sdxx-*"], "no shape matches"),
        (["--clock", "graph", "--device", "cpu"], "cannot time cpu"),
        (["--compare", "no-such-commit"], "git worktree add"),
        (["--plot", "nowhere", "--output", "nothing.csv"], "no measured rows"),
    ],
)
def test_command_line_refuses(
    asked: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main([*asked, "--no-save"])
    assert stop.value.code == 2 and why in capsys.readouterr().err


class _Tree:
    """A process that measured what it is told."""

    def __init__(self, ms: float, problem: str = ""):
        self.ms, self.problem = ms, problem

    def ask(self, **request: object) -> dict[str, object]:
        return {"problem": self.problem} if "prepare" in request else {"ms": self.ms}


@pytest.mark.parametrize(
    ("before", "now", "flagged"),
    [
        (_Tree(1.0), _Tree(1.04), False),
        (_Tree(1.0), _Tree(1.06), True),
        (_Tree(1.0), _Tree(0.5), False),
        (_Tree(1.0), _Tree(1.0, "ValueError: wrong"), True),
        (_Tree(1.0, "Unsupported: no"), _Tree(1.0), False),
    ],
)
def test_comparison_flags_what_became_slower(before: _Tree, now: _Tree, flagged: bool) -> None:
    call = {"shape": "sdxl-1024", "dtype": "float32", "provider": "ours-cpu"}
    assert compare._pair([before, now], call, 5, 0.05) is flagged


def test_comparison_worker_measures_its_own_tree() -> None:
    worker = compare.Worker(ROOT, 1)
    try:
        call = {"shape": "sd15-256", "size": "tiny", "dtype": "float32", "device": "cpu"}
        call |= {"provider": "ours-torch", "clock": "wall"}
        assert worker.ask(prepare=call) == {"problem": ""}
        assert worker.ask(sample=0)["ms"] > 0
        assert "cuDNN" in worker.ask(prepare=call | {"provider": "sdpa-cudnn"})["problem"]
    finally:
        worker.close()


def test_script_lists() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--list"]
    listed = subprocess.run(script, capture_output=True, text=True, check=True)
    assert all(name in listed.stdout for name in (*SHAPES, *PROVIDERS))


def test_committed_results_are_readable() -> None:
    for path in results.RESULTS.glob("*.csv"):
        steps = path.stem.endswith("-steps")
        rows = results.load(path, results.StepRow) if steps else results.load(path)
        assert rows and len({row.key for row in rows}) == len(rows)
        assert all((row.median_ms is None) != (row.status == "ok") for row in rows)


def test_pages_show_what_the_csv_holds() -> None:
    for page, table in pages.pages().items():
        assert table.count("\n") > 5 and table in page.read_text(encoding="utf-8")
