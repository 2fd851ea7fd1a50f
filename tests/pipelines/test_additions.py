"""LoRAs and words of textual inversion, from files, on a UNet (on FLUX: test_flux.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import random_pipelines as tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from styleattn import cli
from styleattn.pipelines.additions import AdditionRefused, Lora, Word, file_digest

torch.set_num_threads(1)


def test_parsing():
    assert Lora.parse("a/b.safetensors") == Lora("a/b.safetensors", 1.0)
    assert Lora.parse("a.safetensors:-0.5") == Lora("a.safetensors", -0.5)
    assert Lora.parse(r"C:\a.safetensors") == Lora(r"C:\a.safetensors", 1.0)
    assert Word.parse(r"C:\a.bin:<cat>") == Word(r"C:\a.bin", "<cat>")
    with pytest.raises(AdditionRefused, match="finite"):
        Lora.parse("a:inf")
    for wrong in ("a.bin", "a.bin:", ":word", "a.bin:two words", r"C:\a.bin"):
        with pytest.raises(AdditionRefused, match="FILE:word"):
            Word.parse(wrong)


def test_a_digest_follows_the_content(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"one")
    first = file_digest(file)
    file.write_bytes(b"three")
    assert first != file_digest(str(file)) and file_digest(None) is None
    (tmp_path / "y").write_bytes(b"one")
    assert file_digest(tmp_path / "y") == first


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("additions")
    pipe = tiny.sdxl()
    pipe.save_pretrained(folder / "model")
    torch.manual_seed(0)
    lora = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_v")):
            lora[f"unet.{name}.lora_A.weight"] = torch.randn(4, module.in_features)
            lora[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 4)
    save_file(lora, folder / "lora.safetensors")
    words = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}
    save_file(words, folder / "word.safetensors")
    save_file({"clip_l": torch.randn(1, 8)}, folder / "narrow.safetensors")
    save_file({"unet.nowhere.lora_A.weight": torch.randn(4, 8)}, folder / "other.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "prompts.txt").write_text("a zqx cat\n")
    return folder


def command(place, out, *more):
    argv = ["stylize", "--model", place / "model", "--reference", place / "a.png", "--out", out]
    argv += ["--prompts", place / "prompts.txt", "--steps", "2", "--guidance", "3"]
    return [*map(str, [*argv, "--device", "cpu", *more])]


def stylize(place, out, *more):
    assert cli.main(command(place, out, *more)) == 0
    (path,) = out.glob("0*.png")
    return np.asarray(Image.open(path).convert("RGB"), float)


def test_a_lora_under_a_style(place, tmp_path):
    """The picture, the reference and the folder's bank hang on its weight."""
    lora, out = place / "lora.safetensors", tmp_path / "a"
    plain = stylize(place, out)
    keys = [json.loads((out / "manifest.json").read_text())["reference"]["fingerprint"]]
    found = {0.0: None, 0.7: None}
    for weight in found:
        found[weight] = stylize(place, out, "--lora", f"{lora}:{weight}")
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["settings"]["loras"][0]["weight"] == weight
        keys.append(manifest["reference"]["fingerprint"])
    assert len(set(keys)) == 3
    assert np.abs(found[0.0] - plain).max() <= 1 < np.abs(found[0.7] - plain).max()
    unstyled = stylize(
        place, tmp_path / "b", "--lora", f"{lora}:0.7", "--set", "layers=up_blocks.0.attentions.0"
    )
    assert np.abs(unstyled - found[0.7]).max() > 1  # the style is at work on the LoRA's layers


def test_a_word_for_both_encoders(place, tmp_path):
    word = f"{place / 'word.safetensors'}:zqx"
    found = stylize(place, tmp_path / "a", "--textual-inversion", word)
    assert np.abs(found - stylize(place, tmp_path / "b")).max() > 1
    (fact,) = json.loads((tmp_path / "a" / "manifest.json").read_text())["settings"][
        "textual_inversions"
    ]
    assert fact["word"] == "zqx" and len(fact["sha256"]) == 64


BAD = [
    (["--lora", "other.safetensors"], "cannot load LoRA"),
    (["--lora", "a.png"], "cannot load LoRA"),
    (["--textual-inversion", "narrow.safetensors:zqx"], "cannot load textual inversion"),
    (["--textual-inversion", "word.safetensors:a"], "already in"),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_what_does_not_fit_is_refused(place, tmp_path, capsys, change, says):
    option, file = change
    assert cli.main(command(place, tmp_path / "out", option, place / file)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
