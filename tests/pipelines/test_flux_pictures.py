"""`styleattn stylize` on a FLUX directory with identities and with pictures in context."""

from __future__ import annotations

import json

import checkpoints
import numpy as np
import pytest
import random_flux
import torch
from PIL import Image
from safetensors.torch import save_file

from styleattn import cli
from styleattn.adapters import save_identity
from styleattn.methods import EasyControl, InContext, PuLIDFLUX
from styleattn.pipelines import load_model
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
PROMPTS = ["a cat", "a house on a hill"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a PuLID checkpoint for it, an identity, a picture and prompts."""
    folder = tmp_path_factory.mktemp("flux")
    random_flux.flux().save_pretrained(folder / "model")
    widths = {"face": 10, "vision": 12, "dim": 24, "queries": 6, "out": 20, "image": 32}
    pulid = checkpoints.noise(checkpoints.pulid(2, **widths, heads=2))
    save_file(pulid, folder / "pulid.safetensors")
    face, vision = torch.randn(1, 10), [torch.randn(1, 7, 12) for _ in range(5)]
    save_identity(folder / "ann.safetensors", face, vision)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def pipe(place):
    pipe = load_model(str(place / "model"), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def command(place, out, method, *more):
    argv = ["stylize", "--model", str(place / "model"), "--method", method, "--out", str(out)]
    argv += ["--prompts", str(place / "prompts.txt"), "--device", "cpu", "--guidance", "3.5"]
    return [*argv, "--steps", "2", "--height", "16", "--width", "16", *map(str, more)]


def stylize(place, out, method, *more):
    """The pictures [n, 16, 16, 3]."""
    assert cli.main(command(place, out, method, *more)) == 0
    return opened(sorted(out.glob("0*.png")))


def opened(pictures):
    found = [Image.open(p) if not isinstance(p, Image.Image) else p for p in pictures]
    return np.stack([np.asarray(p.convert("RGB"), float) for p in found])


def drawn(pipe, *methods):
    """diffusers' own call, with methods at work."""
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.5}
    if not methods:
        return opened(pipe(PROMPTS, generator=generators, **size).images)
    with apply(pipe, *methods):
        return opened(pipe(PROMPTS, generator=generators, **size).images)


def same(a, b):
    return np.abs(a - b).max() <= 1


def test_pulid(place, pipe, tmp_path):
    files = {"adapter": place / "pulid.safetensors", "identity": place / "ann.safetensors"}
    given = ["--adapter", files["adapter"], "--set", f"identity={files['identity']}"]
    found = stylize(place, tmp_path / "a", "pulid_flux", *given, "--set", "id_weight=2")
    assert same(found, drawn(pipe, PuLIDFLUX(**files, id_weight=2.0)))
    assert not same(found, drawn(pipe))
    facts = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert str(files["identity"]) in json.dumps(facts)
    none = stylize(place, tmp_path / "b", "pulid_flux", *given, "--set", "id_weight=0")
    assert same(none, drawn(pipe))


@pytest.mark.parametrize("method", [InContext, EasyControl], ids=lambda m: m.name)
def test_a_picture_in_context(place, pipe, tmp_path, method):
    picture = ["--reference", place / "a.png", "--reference-weight", "0.5"]
    found = stylize(place, tmp_path / "a", method.name, *picture, "--set", "strength=4")
    shown = Reference(image=place / "a.png", weight=0.5)
    assert same(found, drawn(pipe, method(references=shown, strength=4.0)))
    assert not same(found, drawn(pipe))


def test_what_is_missing_is_said(place, tmp_path, capsys):
    wrong = {
        "pulid_flux": ([], "no identity"),
        "in_context": ([], "--reference is missing"),
        "easy_control": (["--reference", place / "a.png", "--set", "lora=x"], "no LoRA 'x'"),
    }
    for method, (more, message) in wrong.items():
        assert cli.main(command(place, tmp_path / method, method, *more)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / method).exists()
