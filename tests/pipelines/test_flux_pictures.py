"""`styleattn stylize` on a FLUX directory with identities and with pictures in context."""

from __future__ import annotations

import json

import pytest
import torch
from flux_folder import PROMPTS, command, furnish, loaded, opened, same, stylize

from styleattn import cli
from styleattn.methods import EasyControl, InContext, PuLIDFLUX
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
GUIDANCE = ("--guidance", "3.5")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def pipe(place):
    return loaded(place)


def drawn(pipe, *methods):
    """diffusers' own call, with methods at work."""
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.5}
    if not methods:
        return opened(pipe(PROMPTS, generator=generators, **size).images)
    with apply(pipe, *methods):
        return opened(pipe(PROMPTS, generator=generators, **size).images)


def test_pulid(place, pipe, tmp_path):
    files = {"adapter": place / "pulid.safetensors", "identity": place / "ann.safetensors"}
    given = ["--adapter", files["adapter"], "--set", f"identity={files['identity']}"]
    found = stylize(place, tmp_path / "a", "pulid_flux", *given, *GUIDANCE, "--set", "id_weight=2")
    assert same(found, drawn(pipe, PuLIDFLUX(**files, id_weight=2.0)))
    assert not same(found, drawn(pipe))
    facts = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert str(files["identity"]) in json.dumps(facts)
    none = stylize(place, tmp_path / "b", "pulid_flux", *given, *GUIDANCE, "--set", "id_weight=0")
    assert same(none, drawn(pipe))


@pytest.mark.parametrize("method", [InContext, EasyControl], ids=lambda m: m.name)
def test_a_picture_in_context(place, pipe, tmp_path, method):
    picture = ["--reference", place / "wide.png", "--reference-weight", "0.5"]
    found = stylize(place, tmp_path / "a", method.name, *picture, *GUIDANCE, "--set", "strength=4")
    shown = Reference(image=place / "wide.png", weight=0.5)
    assert same(found, drawn(pipe, method(references=shown, strength=4.0)))
    assert not same(found, drawn(pipe))


def test_what_is_missing_is_said(place, tmp_path, capsys):
    wrong = {
        "pulid_flux": ([], "no identity"),
        "in_context": ([], "--reference is missing"),
        "easy_control": (["--reference", place / "wide.png", "--set", "lora=x"], "no LoRA 'x'"),
    }
    for method, (more, message) in wrong.items():
        assert cli.main(command(place, tmp_path / method, method, *more)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / method).exists()
