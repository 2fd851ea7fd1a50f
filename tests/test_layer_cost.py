"""What a layer costs: one attention call and the same launches whatever the number of adapters, and
docs/cost.md as the script counts it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import layer_cost  # noqa: E402


def test_one_call_whatever_the_number_of_adapters_and_images():
    """More adapters and images are more bytes of keys and values, and nothing else."""
    found = {
        case: layer_cost.cross_layer(64, 2, *case)
        for case in ((1, 1, False), (1, 4, False), (3, 1, False), (1, 2, True))
    }
    assert {ours.attentions for _, ours in found.values()} == {1}
    assert {ours.launches for (_, _, m), (_, ours) in found.items() if not m} == {6}
    assert [theirs.attentions for theirs, _ in found.values()] == [2, 2, 4, 3]
    for theirs, ours in found.values():
        assert ours.launches < theirs.launches
        assert ours.moved < theirs.moved


def test_adain_moves_no_features():
    theirs, ours = layer_cost.shared_layer(256, 2, 2)
    assert ours.attentions == theirs.attentions == 1
    assert ours.moved < theirs.moved / 3


def test_injection_copies_nothing():
    theirs, ours = layer_cost.injected_layer(64, 2, 3)
    assert ours.attentions == theirs.attentions == 1
    assert ours.launches < theirs.launches and ours.moved < theirs.moved / 2


@pytest.mark.slow
def test_the_page_is_what_the_script_counts():
    assert layer_cost.table() in layer_cost.PAGE.read_text(encoding="utf-8")
