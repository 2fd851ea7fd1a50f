"""FLUX.1 Fill's canvas of two panels: what is on it, what the pipeline makes of it, what is cut
out."""

from __future__ import annotations

import numpy as np
import pytest
import random_flux
import torch
from PIL import Image

from styleattn.inversion import HostUnsupported
from styleattn.methods import FillDiptych, Redux
from styleattn.pipelines import Sampling, fill_canvas, fill_diptych, grid_of
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
PROMPTS = ["a cat", "a house"]
SHORT = Sampling(num_inference_steps=2, guidance_scale=30.0)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hole(width, height, box):
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


def pixels(picture):
    return np.asarray(picture).astype(int)


REFERENCE, TARGET = noise(16, 32, 1), noise(24, 16, 2)
MASK = hole(24, 16, (10, 4, 20, 12))


@pytest.fixture(scope="module")
def pipe():
    return random_flux.fill()


@pytest.mark.parametrize("arrangement", ["side_by_side", "stacked"])
def test_the_canvas(arrangement):
    """A keeps its proportions at the shared side; B is the target, pixel for pixel."""
    found = fill_canvas(
        REFERENCE, TARGET, mask=MASK, height=16, width=24, arrangement=arrangement, multiple=4
    )
    beside = arrangement == "side_by_side"
    assert found.picture.size == ((8 + 24, 16) if beside else (24, 48 + 16))
    assert found.box == ((8, 0, 32, 16) if beside else (0, 48, 24, 64))
    assert found.split == (8 / 32 if beside else 48 / 64)
    a = (0, 0, 8, 16) if beside else (0, 0, 24, 48)
    small = REFERENCE.resize((a[2], a[3]), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(found.picture.crop(a)), pixels(small))
    assert np.array_equal(pixels(found.crop(found.picture)), pixels(TARGET))
    assert np.array_equal(pixels(found.crop(found.mask)), pixels(MASK))
    assert not pixels(found.mask.crop(a)).any()
    assert found.strength == 1.0


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, (768, 512)),
        ({"longest": 100}, (96, 64)),
        ({"width": 100}, (96, 64)),
        ({"height": 70}, (96, 64)),
        ({"height": 50, "width": 33}, (32, 48)),
        ({"longest": 5}, (16, 16)),
    ],
)
def test_sizes_lie_on_the_grid(given, size):
    """Of the target's shape where they are not given; never without a cell."""
    found = fill_canvas(noise(50, 50), noise(48, 32), strength=0.5, **given)
    left, top, right, bottom = found.box
    assert (right - left, bottom - top) == size
    assert all(x % 16 == 0 for x in (*found.box, *found.picture.size))
    tokens = found.picture.width // 16
    assert found.split * tokens == pytest.approx(left // 16)


def test_three_ways_of_working():
    """A blank panel, a target to restyle, a target with a hole."""
    blank = fill_canvas(REFERENCE, multiple=2, longest=32)
    assert blank.strength == 1.0 and blank.box == (16, 0, 32, 32)
    restyled = fill_canvas(REFERENCE, TARGET, multiple=2, longest=24)
    assert restyled.strength == 0.6
    for whole in (blank, restyled):
        assert (pixels(whole.crop(whole.mask)) == 255).all()
    holed = fill_canvas(REFERENCE, TARGET, mask=MASK, strength=0.9, multiple=2, longest=24)
    assert holed.strength == 0.9
    assert (pixels(holed.crop(holed.mask)) == pixels(MASK)).all()


def test_a_pixel_is_painted_where_any_part_of_it_is():
    line = hole(48, 32, (7, 0, 8, 32))
    found = fill_canvas(REFERENCE, noise(48, 32), mask=line, height=16, width=24, multiple=4)
    where = pixels(found.crop(found.mask))
    assert (where[:, 3] == 255).all() and where.sum() == 255 * 16
    grey = Image.new("L", (24, 16), 127)
    with pytest.raises(ValueError, match="all black"):
        fill_canvas(REFERENCE, TARGET, mask=grey)


@pytest.mark.parametrize(
    ("target", "given", "reasons"),
    [
        (TARGET, {"strength": 1.0}, ["the mask is missing"]),
        (TARGET, {"mask": hole(24, 20, (0, 0, 2, 2))}, ["mask is 24 x 20 pixels, the target 24 x"]),
        (
            TARGET,
            {"mask": hole(8, 8, (0, 0, 0, 0)), "strength": 0.0, "arrangement": "round"},
            ["unknown arrangement 'round'", r"in \(0, 1\]", "8 x 8 pixels", "all black"],
        ),
        (None, {"mask": MASK, "strength": 0.5}, ["needs a target to begin", "mask needs a target"]),
        (TARGET, {"strength": "much", "height": 3}, ["strength must lie", "at least 16"]),
    ],
)
def test_what_has_no_meaning_is_refused_whole(target, given, reasons):
    with pytest.raises(ValueError, match=f"fill_canvas: .*{'.*'.join(reasons)}"):
        fill_canvas(REFERENCE, target, **given)


def by_hand(pipe, canvas, prompt, seed):
    """diffusers' own call, whole canvas."""
    width, height = canvas.picture.size
    return pipe(
        prompt,
        image=canvas.picture,
        mask_image=canvas.mask,
        height=height,
        width=width,
        strength=canvas.strength,
        num_inference_steps=2,
        guidance_scale=30.0,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


def same(a, b):
    return np.abs(pixels(a) - pixels(b)).max() <= 1


@pytest.mark.parametrize("mask", [None, MASK], ids=["restyling", "transfer"])
def test_painted_as_diffusers_paints_it(pipe, mask):
    """Canvas, call, crop; a picture is its prompt's and seed's, whatever is in the batch."""
    assert grid_of(pipe) == 2
    canvas = fill_canvas(REFERENCE, TARGET, mask=mask, multiple=2, longest=24)
    method = FillDiptych(b_to_a=3.0, a_to_b=0.0)
    kept = {}
    found = fill_diptych(pipe, canvas, PROMPTS, [3, 4], [method], SHORT, whole=kept.__setitem__)
    knobs = {"split": canvas.split, "b_to_a": 3.0, "a_to_b": 0.0}
    for i, prompt in enumerate(PROMPTS):
        with apply(pipe, FillDiptych(**knobs)):
            expected = by_hand(pipe, canvas, prompt, 3 + i)
        assert found[i].size == (24, 16)
        assert same(kept[i], expected)
        assert np.array_equal(pixels(found[i]), pixels(kept[i].crop(canvas.box)))
        assert not same(found[i], canvas.crop(by_hand(pipe, canvas, prompt, 3 + i)))
    plain = fill_diptych(pipe, canvas, PROMPTS[:1], [3], (), SHORT)[0]
    assert same(plain, canvas.crop(by_hand(pipe, canvas, PROMPTS[0], 3)))
    idle = fill_diptych(pipe, canvas, PROMPTS[:1], [3], sampling=SHORT)[0]
    assert np.array_equal(pixels(idle), pixels(plain))


def test_with_redux(pipe, tmp_path):
    """Its picture is the reference where it has none of its own."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    torch.manual_seed(11)
    embedder = ReduxImageEncoder(redux_dim=32, txt_in_features=32)
    for parameter in embedder.parameters():
        parameter.data.mul_(8.0)
    embedder.save_pretrained(tmp_path / "redux")
    random_flux.siglip().save_pretrained(tmp_path / "siglip")
    files = {
        "adapter": tmp_path / "redux" / "diffusion_pytorch_model.safetensors",
        "image_encoder": tmp_path / "siglip",
    }
    canvas = fill_canvas(REFERENCE, TARGET, mask=MASK, multiple=2, longest=24)
    methods = [FillDiptych(b_to_redux=2.0), Redux(strength=0.7, **files)]
    found = fill_diptych(pipe, canvas, PROMPTS[:1], [0], methods, SHORT)[0]
    shown = Redux(strength=0.7, references=(Reference(image=REFERENCE),), **files)
    with apply(pipe, shown, FillDiptych(b_to_redux=2.0, split=canvas.split)):
        expected = by_hand(pipe, canvas, PROMPTS[0], 0)
    assert same(found, canvas.crop(expected))
    assert not same(found, fill_diptych(pipe, canvas, PROMPTS[:1], [0], methods[:1], SHORT)[0])
    own = Redux(references=(Reference(image=TARGET),), **files)
    other = fill_diptych(pipe, canvas, PROMPTS[:1], [0], [methods[0], own], SHORT)[0]
    assert not same(found, other)


def test_what_does_not_fill_is_refused_whole(pipe):
    canvas = fill_canvas(REFERENCE, multiple=2, longest=16)
    with pytest.raises(HostUnsupported, match="a FluxPipeline takes no masks; its transformer has"):
        fill_diptych(random_flux.flux(), canvas, PROMPTS[:1], [0], sampling=SHORT)
    wrong = Sampling(num_inference_steps=2, negative_prompt="ugly")
    with pytest.raises(ValueError, match="no negative prompt"):
        fill_diptych(pipe, canvas, PROMPTS[:1], [0], sampling=wrong)
