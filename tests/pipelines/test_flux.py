"""`styleattn` on a FLUX directory: prompts or pictures in, pictures out, as Python makes them."""

from __future__ import annotations

import json

import pytest
import random_flux
import torch
from flux_folder import PROMPTS, command, furnish, loaded, opened, other, same, stylize

from styleattn import cli
from styleattn.methods import (
    AlignedGen,
    InstantStyle,
    IPAdapter,
    Redux,
    ReferenceOnly,
    StyleAligned,
    StyleID,
    VisualStylePrompting,
)
from styleattn.processors import apply
from styleattn.processors.bank import build_bank
from styleattn.references import Reference

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def pipe(place):
    return loaded(place)


def drawn(pipe, prompts=PROMPTS, seeds=(0, 1), guidance=3.5, **arguments):
    """diffusers' own call."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": guidance}
    return opened(pipe(list(prompts), generator=generators, **size, **arguments).images)


@pytest.mark.parametrize("method", [StyleAligned, AlignedGen], ids=lambda m: m.name)
def test_references_from_prompts(place, pipe, tmp_path, method):
    """They are the first rows of every batch; batches do not show in the pictures."""
    words = ["--reference-prompt", "a painting", "--reference-prompt", "a print"]
    words += ["--reference-weight", "1", "--reference-weight", "0.5"]
    found = stylize(place, tmp_path / "a", method.name, *words)
    two = method(references=(Reference(), Reference(weight=0.5)))
    with apply(pipe, two):
        expected = drawn(pipe, ["a painting", "a print", *PROMPTS], (0, 1, 0, 1))
    assert same(found, expected[2:])
    assert other(found, drawn(pipe))
    assert same(found, stylize(place, tmp_path / "b", method.name, *words, "--batch-size", "1"))


def test_references_from_pictures(place, pipe, tmp_path, capsys):
    """Inverted once, kept as a bank; the same from a bank that was built before."""
    picture = ["--reference", place / "a.png", "--reference-prompt", "a thing"]
    found = stylize(place, tmp_path / "a", "aligned_gen", *picture)
    shown = Reference(image=place / "a.png", prompt="a thing")
    bank = build_bank(pipe, shown, AlignedGen(), num_inference_steps=2, height=16, width=16)
    with apply(pipe, AlignedGen(), bank=bank):
        assert same(found, drawn(pipe))
    assert other(found, drawn(pipe))
    capsys.readouterr()
    file = tmp_path / "bank.safetensors"
    argv = ["bank", "build", "--model", place / "model", *picture, "--out", file, "--check"]
    argv += ["--steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]
    assert cli.main([*map(str, argv)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["labels"] == ["flow"] and facts["round_trip_error"] >= 0
    assert same(stylize(place, tmp_path / "b", "aligned_gen", "--bank", file), found)


def test_a_content_picture(place, pipe, tmp_path):
    """StyleID without prompts: from the content's noise with the style's statistics."""
    argv = command(place, tmp_path, "style_id", "--reference", place / "b.png")
    argv[argv.index("--prompts") : argv.index("--prompts") + 2] = ["--content", f"{place}/a.png"]
    assert cli.main(argv) == 0
    found = opened(tmp_path.glob("0*.png"))
    both = [Reference(image=place / f"{name}.png") for name in "ab"]
    bank = build_bank(pipe, both, StyleID(), num_inference_steps=2, height=16, width=16)
    content, style = (x.flatten(1) for x in bank.latents[:, 0])
    mean, std = content.mean(1, keepdim=True), content.std(1, keepdim=True)
    start = (content - mean) / std * style.std(1, keepdim=True) + style.mean(1, keepdim=True)
    latents = pipe._pack_latents(start.reshape(1, -1, 16, 16), 1, len(start), 16, 16)
    with apply(pipe, StyleID(), bank=bank):
        expected = drawn(pipe, [""], (0,), guidance=1.0, latents=latents)
    assert same(found, expected)
    assert other(found, drawn(pipe, [""], (0,), guidance=1.0, latents=latents))


@pytest.mark.parametrize("method", [VisualStylePrompting, ReferenceOnly], ids=lambda m: m.name)
def test_pictures_that_are_read(place, pipe, tmp_path, method):
    found = stylize(place, tmp_path, method.name, "--reference", place / "a.png")
    inversion = "noised" if method is ReferenceOnly else None
    size = {"num_inference_steps": 2, "height": 16, "width": 16, "inversion": inversion}
    bank = build_bank(pipe, Reference(image=place / "a.png"), method(), **size)
    with apply(pipe, method(), bank=bank):
        assert same(found, drawn(pipe))
    assert other(found, drawn(pipe))


def test_redux(place, pipe, tmp_path):
    files = ["--adapter", place / "redux.safetensors", "--image-encoder", place / "siglip"]
    pictures = ["--reference", place / "a.png", "--reference", place / "b.png"]
    weights = ["--reference-weight", "0.8", "--reference-weight", "0.3"]
    found = stylize(place, tmp_path / "a", "redux", *files, *pictures, *weights)
    both = tuple(Reference(image=place / f"{n}.png", weight=w) for n, w in (("a", 0.8), ("b", 0.3)))
    made = {"adapter": place / "redux.safetensors", "image_encoder": place / "siglip"}
    with apply(pipe, Redux(references=both, **made)):
        assert same(found, drawn(pipe))
    assert other(found, drawn(pipe))
    none = stylize(place, tmp_path / "b", "redux", *files, *pictures[:2], "--set", "strength=0")
    assert same(none, drawn(pipe))


@pytest.mark.parametrize(("make", "encoder"), [("xlabs", "clip"), ("instantx", "siglip")])
def test_ip_adapters(place, pipe, tmp_path, make, encoder):
    file, folder = place / f"{make}.safetensors", place / encoder
    more = ["--adapter", file, "--image-encoder", folder, "--reference", place / "a.png"]
    found = stylize(place, tmp_path / "a", "ip_adapter", *more, "--set", "scale=3")
    references = (Reference(image=place / "a.png"),)
    shown = {"adapter": file, "image_encoder": folder, "references": references}
    with apply(pipe, IPAdapter(scale=3.0, **shown)):
        assert same(found, drawn(pipe))
    assert other(found, drawn(pipe))
    blocks = {"transformer_blocks.0": 3.0}
    argument = f"blocks={json.dumps(blocks)}"
    one = stylize(place, tmp_path / "b", "instant_style", *more, "--set", argument)
    with apply(pipe, InstantStyle(blocks=blocks, **shown)):
        assert same(one, drawn(pipe))
    assert other(one, found)


def test_true_guidance(place, pipe, tmp_path):
    words = ["--true-guidance", "3", "--negative-prompt", "ugly", "--guidance", "2"]
    words += ["--reference-prompt", "a painting"]
    found = stylize(place, tmp_path / "a", "style_aligned", *words)
    guided = {"true_cfg_scale": 3.0, "negative_prompt": ["ugly"] * 3, "guidance": 2.0}
    with apply(pipe, StyleAligned()):
        expected = drawn(pipe, ["a painting", *PROMPTS], (0, 0, 1), **guided)
    assert same(found, expected[1:])


def test_a_lora(place, tmp_path):
    """It changes the pictures by its weight, the method works on what it gives, and the manifest
    says so; another weight makes them anew."""
    words, lora = ["--reference-prompt", "a painting"], place / "lora.safetensors"
    out = tmp_path / "a"
    plain = stylize(place, tmp_path / "plain", "style_aligned", *words)
    found = stylize(place, out, "style_aligned", *words, "--lora", f"{lora}:0.7")
    assert other(found, plain)
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    (fact,) = settings["loras"]
    assert (fact["file"], fact["weight"]) == (str(lora), 0.7) and len(fact["sha256"]) == 64
    fresh = loaded(place)
    fresh.load_lora_weights(str(place), weight_name=lora.name, adapter_name="one")
    fresh.set_adapters(["one"], [0.7])
    with apply(fresh, StyleAligned()):
        expected = drawn(fresh, ["a painting", *PROMPTS], (0, 0, 1))[1:]
    assert same(found, expected)
    assert other(found, drawn(fresh))
    none = stylize(place, out, "style_aligned", *words, "--lora", f"{lora}:0")
    assert same(none, plain)


def test_a_word(place, tmp_path):
    """Embeddings for both encoders; the word is not what it was letter by letter."""
    (place / "words.txt").write_text("zqx\na zqx cat")
    words = ["--reference-prompt", "a painting", "--prompts", place / "words.txt"]
    plain = stylize(place, tmp_path / "a", "style_aligned", *words)
    taught = ["--textual-inversion", f"{place / 'word.safetensors'}:zqx"]
    found = stylize(place, tmp_path / "b", "style_aligned", *words, *taught)
    assert other(found, plain)
    settings = json.loads((tmp_path / "b" / "manifest.json").read_text())["settings"]
    assert settings["textual_inversions"][0]["word"] == "zqx"


BAD = [
    (["--reference", "{place}/a.png", "--inversion", "ddim"], "is not inverted by 'ddim'"),
    (["--scheduler", "ddim"], "DDIM is no scheduler of FLUX"),
    (["--negative-prompt", "ugly"], "under a true guidance above 1"),
    (["--true-guidance", "0.5"], "true_guidance"),
    (["--height", "15"], "multiples of 2"),
    (
        ["--method", "z_star"],
        "no recipe for 'z_star' on FLUX: it runs on UNets; there it has style_aligned",
    ),
    (["--method", "style_id", "--reference", "{place}/a.png"], "--content is missing"),
    (["--method", "redux"], "is shown a picture"),
    (["--lora", "{place}/nowhere.safetensors"], "no such file"),
    (["--lora", "{place}/a.png"], "cannot load LoRA"),
    (["--lora", "{place}/lora.safetensors:nan"], "must be finite"),
    (["--lora", "{place}/redux.safetensors"], "cannot load LoRA"),
    (["--textual-inversion", "{place}/word.safetensors"], "FILE:word"),
    (["--textual-inversion", "{place}/redux.safetensors:x"], "one tensor"),
    (["--set", "layers=up_blocks.0"], "up_blocks.0"),
    (["--set", "layers=ease in"], "ease in"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=["_".join(c)[:30] for c, _ in BAD])
def test_bad_input(place, tmp_path, capsys, change, message):
    words = [] if "--reference" in change or "redux" in change else ["--reference-prompt", "x"]
    change = [part.format(place=place) for part in change]
    assert cli.main(command(place, tmp_path / "out", "style_aligned", *words, *change)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("styleattn: ") and message in line, line
    assert not (tmp_path / "out").exists()


def test_a_model_without_guidance(place, tmp_path, capsys):
    random_flux.flux(guidance_embeds=False).save_pretrained(tmp_path / "schnell")
    argv = command(place, tmp_path / "out", "style_aligned", "--reference-prompt", "a painting")
    argv[argv.index("--model") + 1] = str(tmp_path / "schnell")
    assert cli.main([*argv, "--guidance", "3"]) == 2
    assert "distilled without a guidance scale" in capsys.readouterr().err
    assert cli.main(argv) == 0
    sampling = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["sampling"]
    assert sampling["guidance_scale"] == 0.0


def test_explain_and_doctor(place, capsys, monkeypatch):
    from styleattn.pipelines import doctor

    argv = ["explain", "--model", str(place / "model"), "--device", "cpu", "--method"]
    assert cli.main([*argv, "aligned_gen"]) == 0
    assert "single_transformer_blocks.1.attn" in capsys.readouterr().out
    more = ["--reference", place / "a.png", "--adapter", place / "redux.safetensors"]
    more += ["--image-encoder", place / "siglip"]
    assert cli.main([*argv, "redux", *map(str, more)]) == 0
    assert "redux" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "_EXAMINERS", ())
    assert cli.main(["doctor", "--model", str(place / "model")]) == 0
    text = capsys.readouterr().out
    assert "FLUX transformer" in text and "stylize has style_aligned, aligned_gen" in text
    assert cli.main(["doctor", "--model", str(place)]) == 1
    assert "broken  model" in capsys.readouterr().out
