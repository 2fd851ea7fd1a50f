"""How well drawings come back from their noise on `tiny-flux`: what the cookbook's table says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from styleattn import tiny
from styleattn.inversion import flow_invert, flow_restore


def test_round_trips_of_drawings() -> None:
    torch.set_num_threads(1)
    pipe = tiny.load("tiny-flux")
    options = {"num_inference_steps": 16, "max_sequence_length": 16, "height": 32, "width": 32}
    errors: dict[str, list[float]] = {"euler": [], "rf_solver": [], "rf_inversion": [], "drawn": []}
    for reference in tiny.references()[:3]:
        for method in ("euler", "rf_solver", "rf_inversion"):
            found = flow_invert(
                pipe, reference.image, reference.prompt, method=method, round_trip=True, **options
            )
            assert found.round_trip_error is not None
            errors[method].append(found.round_trip_error)
        clean = found.latents[-1:]
        back = flow_restore(pipe, found, steps=(0.0, 1.0), max_sequence_length=16)
        errors["drawn"].append(float((back - clean).norm() / clean.norm()))
    means = {name: sum(x) / len(x) for name, x in errors.items()}
    assert means["drawn"] < 0.02
    assert means["rf_solver"] < 0.15
    assert 0.2 < means["rf_inversion"] < 0.8
    assert means["euler"] > 3 * means["rf_solver"]
