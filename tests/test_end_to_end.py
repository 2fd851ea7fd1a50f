"""Whole steps of small denoisers, as benchmarks/end_to_end.py times the large ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import end_to_end
import models
import results
import routes

torch.set_num_threads(1)


def test_tiny_run(tmp_path):
    """Ours equals the official route in every model and method; rows keep what was measured."""
    output = tmp_path / "steps.csv"
    assert end_to_end.main(["--tiny", "--rounds", "1", "--output", str(output)]) == 0
    rows = results.load(output, results.StepRow)
    seen = {(r.model, r.method, r.route, r.batch) for r in rows}
    for model, methods in routes.METHODS.items():
        for batch in (1, 2):
            assert (model, "", "plain", batch) in seen
            for method in methods:
                there = batch > 1 or method != "style_aligned"
                assert ((model, method, "ours", batch) in seen) == there
                assert ((model, method, "official", batch) in seen) == there
    assert all(r.status == "ok" and r.median_ms > 0 and r.tax > 0 for r in rows)
    assert all(r.error <= r.budget < 1e-5 for r in rows if r.route == "ours")
    results.save(output, rows, results.StepRow)
    assert len(results.load(output, results.StepRow)) == len(rows)


def setting(name):
    torch.manual_seed(0)
    model = models.models(tiny=True)[name]
    inputs = model.inputs(2, torch.Generator().manual_seed(0))
    return end_to_end.Setting(model, model.build(), inputs, 2, torch.device("cpu"))


def test_the_comparison_notices(monkeypatch):
    """A route that is another method's, and one without a style, get no time."""
    here = setting("flux")
    chosen = end_to_end.contestants(here.model, ["redux"], 2)
    assert end_to_end.checked(here, chosen)["redux"][2] == ""
    for wrong, reason in ((routes.ours_shared, "above the budget"), (routes.plain, "above")):
        spoiled = [*chosen[:2], end_to_end.Contestant("redux", "ours", wrong)]
        assert reason in end_to_end.checked(here, spoiled)["redux"][2]
    blind = [chosen[0], *(end_to_end.Contestant("redux", r, routes.plain) for r in ("a", "b"))]
    assert "not to be seen" in end_to_end.checked(here, blind)["redux"][2]


def test_routes_leave_nothing_behind():
    here = setting("sdxl")
    plain = end_to_end.contestants(here.model, [], 2)[0]
    before, processors = here.result(plain), dict(here.denoiser.attn_processors)
    for pair in routes.METHODS["sdxl"].values():
        for route in pair:
            assert not torch.equal(here.result(end_to_end.Contestant("", "", route)), before)
            assert torch.equal(here.result(plain), before)
            assert all(here.denoiser.attn_processors[n] is p for n, p in processors.items())


def test_what_cannot_be_done_is_a_row():
    here = setting("flux")
    chosen = end_to_end.contestants(here.model, ["redux"], 2)
    (rows,) = end_to_end.rows_of(here, chosen, ["graph"], 1, float("inf"), "tiny")
    assert all(r.status == "FAILED: RuntimeError: no graphs on cpu" for r in rows)
    (rows,) = end_to_end.rows_of(here, chosen, ["eager"], 1, 0.0, "tiny")
    assert all(r.status == "FAILED: out of time" and r.median_ms is None for r in rows)


def test_published_sizes():
    """Billions of parameters, counted without making them."""
    found = models.models(tiny=False)
    with torch.device("meta"):
        sizes = {n: sum(p.numel() for p in m.build().parameters()) for n, m in found.items()}
    assert sizes["sdxl"] == pytest.approx(2.567e9, rel=1e-3)
    assert sizes["flux"] == pytest.approx(11.90e9, rel=1e-3)
