"""The drawings: deterministic, distinct, and styled all over."""

from __future__ import annotations

import numpy as np
import pytest

from styleattn import tiny
from styleattn.tiny.captions import caption, words
from styleattn.tiny.drawings import CONTENTS, SIZE, STYLES, TEXTURES, Style, draw, style_of


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_drawing_is_a_function_of_its_seed() -> None:
    first = draw("boat", "rows ocean inked", rng(3))
    np.testing.assert_array_equal(first, draw("boat", "rows ocean inked", rng(3)))
    assert (first != draw("boat", "rows ocean inked", rng(4))).any()
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8


@pytest.mark.parametrize("content", CONTENTS)
def test_ground_and_figure_both_fill_a_good_part_of_the_picture(content: str) -> None:
    plain = draw(content, Style("plain", "mono"), rng(1)).astype(int).mean(-1)
    figure = (plain < 140).mean()
    assert 0.08 < figure < 0.6


@pytest.mark.parametrize("texture", [t for t in TEXTURES if t != "plain"])
def test_a_texture_covers_ground_and_figure(texture: str) -> None:
    plain = draw("cross", Style("plain", "ember"), rng(2)).astype(int)
    textured = draw("cross", Style(texture, "ember"), rng(2)).astype(int)
    changed = np.abs(plain - textured).sum(-1) > 20
    figure = plain[..., 1] > 100
    assert 0.2 < changed[figure].mean() < 0.8
    assert 0.2 < changed[~figure].mean() < 0.8


def test_all_styles_and_contents_look_different() -> None:
    drawings = [draw("star", style, rng(0)).tobytes() for style in STYLES]
    drawings += [draw(content, STYLES[0], rng(0)).tobytes() for content in CONTENTS[1:]]
    assert len(set(drawings)) == len(drawings)


def test_captions_name_the_content_always_and_the_style_if_asked() -> None:
    style = Style("dots", "candy", "glowing")
    for seed in range(50):
        assert "heart" in caption("heart", style, rng(seed), styled=0.5).split(",")[0].split()
        assert "candy" not in caption("heart", style, rng(seed), styled=0.0)
        assert {"dots", "candy", "glowing"} <= set(caption("heart", style, rng(seed), 1.0).split())


def test_every_word_is_one_token(tmp_path: object) -> None:
    transformers = pytest.importorskip("transformers")
    from pathlib import Path

    from styleattn.tiny.captions import MAX_TOKENS, save_tokenizer

    save_tokenizer(Path(str(tmp_path)))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert tokenizer.model_max_length == MAX_TOKENS
    for word in words():
        assert len(tokenizer(word).input_ids) == 3, word
    assert len({tuple(tokenizer(word).input_ids) for word in words()}) == len(words())
    assert len(tokenizer("zebra").input_ids) > 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: tiny.drawing("castle", "rows ocean"), "castle"),
        (lambda: tiny.drawing("star", "tartan ocean"), "tartan"),
        (lambda: tiny.drawing("star", "rows"), "texture palette"),
        (lambda: style_of("rows ocean inked bold"), "texture palette"),
        (lambda: tiny.path("huge-sdxl"), "tiny-sdxl"),
        (lambda: tiny.load("huge-sdxl"), "tiny-sdxl"),
    ],
)
def test_unknown_names_are_refused_by_name(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()  # type: ignore[operator]


def test_references_differ_in_texture_and_palette() -> None:
    found = tiny.references()
    assert (
        len({r.style.texture for r in found}) == len({r.style.palette for r in found}) == len(found)
    )
    assert all(r.image.size == (SIZE, SIZE) and r.image.mode == "RGB" for r in found)
    assert found[0].image.tobytes() == tiny.references()[0].image.tobytes()
    assert all(r.content in r.prompt and r.prompt in tiny.prompts() for r in found)
