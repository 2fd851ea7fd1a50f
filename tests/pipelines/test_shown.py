"""`styleattn stylize` with methods that are shown pictures: adapter files in, pictures out."""

from __future__ import annotations

import json
from pathlib import Path

import image_prompts as images
import numpy as np
import pytest
import random_pipelines as tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from styleattn import cli
from styleattn.adapters import ip_adapter_from
from styleattn.methods import InstantStyle, IPAdapter
from styleattn.pipelines import load_model
from styleattn.processors import apply
from styleattn.references import Reference

FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model with an image encoder, one without, adapters, pictures and prompts."""
    folder = tmp_path_factory.mktemp("place")
    pipe = tiny.sdxl()
    pipe.save_pretrained(folder / "bare")
    pipe.register_modules(image_encoder=images.encoder(), feature_extractor=images.extractor())
    pipe.save_pretrained(folder / "model")
    images.encoder().save_pretrained(folder / "encoder")
    save_file(images.flat(images.checkpoint(pipe.unet)), folder / "ip.safetensors")
    torch.save(images.checkpoint(pipe.unet, 1), folder / "other.bin")
    for i in (0, 1):
        images.picture(i).save(folder / f"style{i}.png")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder


def stylize(
    place: Path, out: Path, *more: str, model: str = "model", adapter: str = "ip.safetensors"
):
    argv = ["stylize", "--model", str(place / model), "--adapter", str(place / adapter)]
    argv += ["--reference", str(place / "style0.png"), "--prompts", str(place / "prompts.txt")]
    return [*argv, "--out", str(out), *FAST, *more]


def pictures(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


@pytest.mark.parametrize("method", ["ip_adapter", "instant_style"])
def test_a_picture_in_and_pictures_out(place, tmp_path, capsys, method):
    """What the same method gives in Python; a second run finds everything; other pictures, files
    and weights make other pictures."""
    assert cli.main(stylize(place, tmp_path / "out", "--method", method)) == 0
    assert "2 of 2 pictures" in capsys.readouterr().out
    found = pictures(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    settings = manifest["settings"]["method"]
    assert (settings["method"], settings["adapter"]) == (method, str(place / "ip.safetensors"))
    assert manifest["settings"]["sampling"]["guidance_scale"] == {"ip_adapter": 7.5}.get(
        method, 5.0
    )
    pipe = load_model(str(place / "model"), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    cross = pipe.unet.config.cross_attention_dim
    layers = [
        (n, pipe.unet.get_submodule(n).inner_dim, cross) for n in images.cross_layers(pipe.unet)
    ]
    adapter = ip_adapter_from(images.flat(images.checkpoint(pipe.unet)), layers)
    kind = {"ip_adapter": IPAdapter, "instant_style": InstantStyle}[method]
    shown = kind(adapter=adapter, references=Reference(image=place / "style0.png"))
    plain, styled = [], []
    for out in (plain, styled):
        generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
        call = {"num_inference_steps": 2, "generator": generators}
        call["guidance_scale"] = {"ip_adapter": 7.5}.get(method, 5.0)
        if out is plain:
            out += pipe(["a cat", "a dog"], **call).images
            continue
        with apply(pipe, shown):
            out += pipe(["a cat", "a dog"], **call).images
    for made, expected, other in zip(read(tmp_path / "out"), styled, plain, strict=True):
        assert difference(made, expected) <= 1
        assert difference(other, expected) > 8
    assert cli.main(stylize(place, tmp_path / "out", "--method", method)) == 0
    assert "0 of 2 pictures" in capsys.readouterr().out
    for more, adapter_ in (([], "other.bin"), (["--reference-weight", "0.5"], "ip.safetensors")):
        again = stylize(place, tmp_path / "out", "--method", method, *more, adapter=adapter_)
        assert cli.main(again) == 0
        assert "2 of 2 pictures" in capsys.readouterr().out
        assert pictures(tmp_path / "out") != found


def difference(a, b) -> int:
    """Of two pictures, in steps of 8 bits."""
    a, b = (np.asarray(x, dtype=np.int16) for x in (a, b))
    return int(np.abs(a - b).max())


def read(folder: Path):
    found = []
    for path in sorted(folder.glob("0*.png")):
        with Image.open(path) as image:
            found.append(image.convert("RGB"))
    return found


def test_two_pictures_and_an_encoder_of_its_own(place, tmp_path, capsys):
    """A model without an image encoder; two references with weights; knobs by --set."""
    more = ["--method", "ip_adapter", "--image-encoder", str(place / "encoder")]
    more += [
        "--reference",
        str(place / "style1.png"),
        "--set",
        "scale=0.6",
        "--set",
        "layers=ease in",
    ]
    more += ["--reference-weight", "1", "--reference-weight", "0.5"]
    assert cli.main(stylize(place, tmp_path / "out", *more, model="bare")) == 0
    method = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["method"]
    assert [r["weight"] for r in method["references"]] == [1.0, 0.5]
    assert (method["scale"], method["layers"]) == (0.6, "ease in")
    assert len(pictures(tmp_path / "out")) == 2


def test_what_is_refused(place, tmp_path, capsys):
    def refused(argv, match):
        assert cli.main(argv) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("styleattn: ") and match in line, line
        assert not pictures(tmp_path / "out")

    ip = ["--method", "ip_adapter"]
    refused(stylize(place, tmp_path / "out", *ip, model="bare"), "the pipeline has none")
    refused(stylize(place, tmp_path / "out", *ip, adapter="none.bin"), "no such adapter file")
    refused(stylize(place, tmp_path / "out", *ip, adapter="prompts.txt"), "prompts.txt")
    refused(stylize(place, tmp_path / "out", "--method", "style_aligned"), "no knob adapter")
    argv = stylize(place, tmp_path / "out", *ip)
    at = argv.index("--reference")
    refused([*argv[:at], *argv[at + 2 :]], "--reference is missing")
    refused([*argv, "--bank", "bank.safetensors"], "takes no --bank")
    at = argv.index("--adapter")
    refused([*argv[:at], *argv[at + 2 :]], "--adapter is missing: ip_adapter needs")
