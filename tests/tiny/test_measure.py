"""The measure, held against drawings that neither it nor the model was made with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from styleattn import tiny
from styleattn.tiny import measure
from styleattn.tiny.drawings import CONTENTS, STYLES, Style, draw


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_held_out_drawings_are_read_rightly() -> None:
    found = measure.validate(count=600)
    assert found["texture"] >= 0.99 and found["palette"] >= 0.99 and found["style"] >= 0.99
    assert found["content"] >= 0.97 and found["edge"] >= 0.97


def test_noisy_and_blurred_drawings_are_still_read() -> None:
    rng = np.random.default_rng([5, 5, 5])
    contents = [CONTENTS[i] for i in rng.integers(len(CONTENTS), size=200)]
    styles = [STYLES[i] for i in rng.integers(len(STYLES), size=200)]
    noisy = []
    for content, style in zip(contents, styles, strict=True):
        clean = draw(content, style, rng).astype(float)
        noisy.append(np.clip(clean + 6 * rng.standard_normal(clean.shape), 0, 255).astype(np.uint8))
    found = measure.score(noisy, contents, styles, contents)
    assert found.style_match >= 0.95 and found.content_accuracy >= 0.95


def test_pictures_without_a_style_are_not_given_one() -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert measure.read_texture(noise) is None
    assert measure.read_palette(np.full((32, 32, 3), (255, 0, 255), np.uint8)) is None
    halves = draw("star", Style("rows", "ocean"), rng)
    halves[:, 16:] = draw("star", Style("columns", "ocean"), rng)[:, 16:]
    assert measure.read_texture(halves) is None


def test_the_score_counts_what_it_says() -> None:
    rows, dots = Style("rows", "ocean"), Style("dots", "candy")
    star, boat = (np.asarray(tiny.drawing(c, rows, 5)) for c in ("star", "boat"))
    found = measure.score(
        [star, boat, star], ["star", "star", "star"], [rows, rows, dots], ["boat"] * 3
    )
    assert found.count == 3
    assert found.style_match == pytest.approx(2 / 3)
    assert found.content_accuracy == pytest.approx(2 / 3)
    assert found.leakage == pytest.approx(1 / 3)
    assert found.leakage_chance == pytest.approx(1 / 3 / 7)
    same = measure.score([star], ["star"], [rows], ["star"])
    assert same.leakage == same.leakage_chance == 0.0


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[32, 32, 3\]"):
        measure.read([np.zeros((64, 64, 3), np.uint8)])
    with pytest.raises(ValueError, match="as many"):
        measure.score([np.zeros((32, 32, 3), np.uint8)], [], [], [])
    with pytest.raises(ValueError, match="as many"):
        measure.score([], [], [], [])
    assert measure.read([]) == []


def test_the_classifier_trains_deterministically() -> None:
    from styleattn.tiny.classifier import train

    first, second = (train(seed=1, steps=2, batch=4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
