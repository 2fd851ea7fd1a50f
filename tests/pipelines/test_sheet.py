"""Contact sheets: sharp, in order, with labels inside their cells."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from styleattn.pipelines import Cell, contact_sheet
from styleattn.pipelines.sheet import enlarge


def chessboard() -> Image.Image:
    return Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")


def test_small_pictures_stay_sharp():
    big = enlarge(chessboard(), 100)
    assert big.size == (96, 96)
    assert set(np.unique(np.asarray(big))) == {0, 255}
    assert np.array_equal(np.asarray(big)[::12, ::12], np.asarray(chessboard()))


def test_large_pictures_shrink_in_proportion():
    assert enlarge(Image.new("RGB", (400, 200)), 100).size == (100, 50)


def test_layout():
    rows = [[Cell(chessboard(), "one"), Cell(chessboard(), "two words")], [Cell(label="empty")]]
    sheet = contact_sheet(rows, title="A title", size=64)
    pixels = np.asarray(sheet)
    assert sheet.width >= 8 + 2 * (64 + 8)
    black = (pixels == 0).all(-1)
    assert black[:, : sheet.width // 2].any() and black[:, sheet.width // 2 :].any()
    assert np.array_equal(pixels, np.asarray(contact_sheet(rows, title="A title", size=64)))
    assert contact_sheet(rows[:1], size=64).height < sheet.height


def test_labels_stay_in_their_cells():
    long = "a rather long prompt with many words that cannot possibly fit below " * 3
    sheet = contact_sheet([[Cell(None, long), Cell(None, "x" * 200)]], size=64)
    ink = (np.asarray(sheet) < 100).all(-1)
    assert ink.any() and not ink[:, 72:80].any()  # the gap between the cells


def test_nothing_to_show():
    with pytest.raises(ValueError, match="nothing to show"):
        contact_sheet([[]])
