"""`styleattn stylize --method fill_diptych`: two pictures and a mask in, panels out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from flux_folder import furnish, loaded
from PIL import Image

from styleattn import cli
from styleattn.methods import FillDiptych, Redux
from styleattn.pipelines import Sampling, fill_canvas, fill_diptych
from styleattn.references import Reference

torch.set_num_threads(1)
SHORT = Sampling(num_inference_steps=2, guidance_scale=30.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The furnished folder, another content, masks and prompts of its own."""
    folder = furnish(tmp_path_factory.mktemp("fill"))
    pixels = np.random.default_rng(2).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "hall.png")
    Image.new("L", (12, 8), 0).save(folder / "black.png")
    Image.new("L", (6, 8), 255).save(folder / "small.png")
    (folder / "prompts.txt").write_text("a lamp\na chair\n")
    return folder


@pytest.fixture(scope="module")
def pipe(place):
    return loaded(place, "fill")


def command(place, out, *more, model="fill"):
    argv = ["stylize", "--model", str(place / model), "--method", "fill_diptych"]
    argv += ["--content", place / "room.png", "--reference", place / "style.png", "--out", out]
    argv += ["--device", "cpu", "--steps", "2", "--height", "8", "--width", "12", *more]
    return [str(a) for a in argv]


def opened(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), int)


def stylize(place, out, *more):
    assert cli.main(command(place, out, *more)) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    return [opened(out / entry["file"]) for entry in manifest["pictures"]], manifest


def canvas(place, content="room", **more):
    return fill_canvas(
        place / "style.png", place / f"{content}.png", height=8, width=12, multiple=2, **more
    )


def same(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_transfer_with_redux(place, pipe, tmp_path):
    """What Python gives for both prompts; canvases beside the pictures; found when run again."""
    files = {"adapter": place / "redux.safetensors", "image_encoder": place / "siglip"}
    more = ["--mask", place / "mask.png", "--prompts", place / "prompts.txt", "--canvas"]
    more += ["--adapter", files["adapter"], "--image-encoder", files["image_encoder"]]
    more += ["--reference-weight", "0.7", "--set", "b_to_a=3", "--set", "arrangement=stacked"]
    found, manifest = stylize(place, tmp_path / "a", *more)
    made = canvas(place, mask=place / "mask.png", arrangement="stacked")
    shown = (Reference(image=place / "style.png", weight=0.7),)
    methods = [FillDiptych(b_to_a=3.0), Redux(references=shown, **files)]
    whole = {}
    expected = fill_diptych(
        pipe, made, ["a lamp", "a chair"], [0, 1], methods, SHORT, whole=whole.__setitem__
    )
    assert all(map(same, found, expected)) and not same(*expected)
    for i, entry in enumerate(manifest["pictures"]):
        assert same(opened(tmp_path / "a" / entry["canvas"]), whole[i])
    filling = manifest["settings"]["filling"]
    assert filling["redux"]["method"] == "redux" and len(filling["redux_files"]["adapter"]) == 64
    assert filling["canvas"] and len(filling["mask"]) == 64
    assert [c["name"] for c in manifest["contents"]] == ["room"]
    _, again = stylize(place, tmp_path / "a", *more)
    assert all(entry["found"] for entry in again["pictures"])
    _, other = stylize(place, tmp_path / "a", *more, "--strength", "0.9")
    assert not any(entry["found"] for entry in other["pictures"])


def test_restyling_without_redux(place, pipe, tmp_path):
    """Two content pictures, no mask, no prompts; no canvases where none are asked for."""
    found, manifest = stylize(place, tmp_path / "a", "--content", place / "hall.png")
    for i, name in enumerate(("room", "hall")):
        made = canvas(place, name)
        (expected,) = fill_diptych(pipe, made, [""], [i], [FillDiptych()], SHORT)
        assert made.strength == 0.6 and same(found[i], expected)
    assert manifest["settings"]["sampling"]["guidance_scale"] == 30.0
    assert len(list((tmp_path / "a").glob("0*.png"))) == 2


BAD = [
    (["--mask", "{place}/small.png"], "the mask is 6 x 8 pixels, the target 12 x 8"),
    (["--mask", "{place}/black.png"], "all black"),
    (["--mask", "{place}/none.png"], "no such picture"),
    (["--strength", "1"], "the mask is missing"),
    (["--strength", "1", "--mask", "{place}/black.png", "--set", "a_to_b=-1"], "a_to_b"),
    (["--reference", "{place}/room.png"], "takes one --reference"),
    (["--negative-prompt", "ugly", "--set", "split=0.3"], "guidance; split follows"),
    (["--image-encoder", "{place}/siglip"], "Redux', which needs --adapter"),
    (["--adapter", "{place}/redux.safetensors"], "pipeline has none"),
    (["--content-prompt", "x"], "--prompts say what is painted"),
    (["--height", "7"], "multiples of 2"),
    (["--bank", "{place}/bank"], "--bank excludes --reference"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=["_".join(c)[:30] for c, _ in BAD])
def test_bad_input(place, tmp_path, capsys, change, message):
    change = [part.format(place=place) for part in change]
    assert cli.main(command(place, tmp_path / "out", *change)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("styleattn: ") and message in line, line
    assert not (tmp_path / "out").exists()


def test_models_and_methods_that_do_not_go_together(place, tmp_path, capsys):
    def refused(argv, message):
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    argv = command(place, tmp_path / "out", model="model")
    refused(argv, "draws with a FluxFillPipeline, not a FluxPipeline")
    argv[argv.index("--model") + 1] = "tiny-flux"
    refused(argv, "needs a directory of FLUX.1 Fill; tiny-flux does not fill")
    argv = command(place, tmp_path / "out", "--mask", str(place / "mask.png"))
    argv[argv.index("fill_diptych")] = "redux"
    at = argv.index("--content")
    redux = [*argv[:at], *argv[at + 2 :], "--adapter", str(place / "redux.safetensors")]
    redux += ["--prompts", str(place / "prompts.txt")]
    refused(redux, "--mask: only fill_diptych paints on a canvas")
    at = redux.index("--mask")
    redux = [*redux[:at], *redux[at + 2 :]]
    refused(redux, "draws with a FluxPipeline, not a FluxFillPipeline")


def test_doctor_and_explain(place, capsys, monkeypatch):
    """What goes with a model that fills, and what does not."""
    from styleattn.pipelines import doctor

    monkeypatch.setattr(doctor, "_EXAMINERS", ())
    assert cli.main(["doctor", "--model", str(place / "fill")]) == 0
    assert "stylize has fill_diptych\n" in capsys.readouterr().out
    argv = ["explain", "--device", "cpu", "--method", "fill_diptych", "--set", "b_to_a=2"]
    assert cli.main([*argv, "--model", str(place / "fill")]) == 0
    assert "single_transformer_blocks.1.attn" in capsys.readouterr().out
    assert cli.main([*argv, "--model", str(place / "model")]) == 2
    assert "needs FLUX.1 Fill: a FluxPipeline takes no masks" in capsys.readouterr().err
