"""A folder with all that the FLUX methods may ask for, and the command line that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import random_flux
import torch
from PIL import Image
from safetensors.torch import save_file

from styleattn import cli
from styleattn.adapters import save_identity
from styleattn.pipelines import load_model

PROMPTS = ["a cat", "a house on a hill"]
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
LORA = [f"{block}.{i}.attn.to_{part}" for block in BLOCKS for i in range(2) for part in "qkv"]
PULID = {"face": 10, "vision": 12, "dim": 24, "queries": 6, "out": 20, "image": 32, "heads": 2}
PICTURES = {"a": (32, 32), "b": (32, 32), "wide": (16, 12), "style": (16, 16), "room": (12, 8)}
"""Width and height."""


def furnish(folder: Path) -> Path:
    """A model, one that fills, encoders, adapters, an identity, a LoRA, a word, pictures, a mask
    and prompts."""
    random_flux.flux().save_pretrained(folder / "model")
    random_flux.fill().save_pretrained(folder / "fill")
    random_flux.siglip().save_pretrained(folder / "siglip")
    random_flux.siglip(num_hidden_layers=20).save_pretrained(folder / "siglip-deep")
    random_flux.clip_vision().save_pretrained(folder / "clip")
    shapes = {"redux_up.weight": (48, 32), "redux_up.bias": (48,)}
    shapes |= {"redux_down.weight": (32, 48), "redux_down.bias": (32,)}
    files = {"redux": {n: 8 * t for n, t in checkpoints.noise(shapes).items()}}
    files["xlabs"] = checkpoints.noise(checkpoints.xlabs(2, 32, 32, 32, 4))
    files["instantx"] = checkpoints.noise(checkpoints.instantx(4, 32, 32, 32, 5))
    files["uso"] = {n: 4 * t for n, t in checkpoints.noise(checkpoints.uso(32, 16, 3, 32)).items()}
    files["pulid"] = checkpoints.noise(checkpoints.pulid(2, **PULID))
    torch.manual_seed(3)
    lora = {f"transformer.{n}.lora_{x}.weight": torch.randn(4, 32) for n in LORA for x in "AB"}
    files["lora"] = {n: t.T.contiguous() if "lora_B" in n else t for n, t in lora.items()}
    files["word"] = {"clip_l": torch.randn(2, 32), "t5": torch.randn(2, 32)}
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    face, vision = torch.randn(1, 10), [torch.randn(1, 7, 12) for _ in range(5)]
    save_identity(folder / "ann.safetensors", face, vision)
    for i, (name, size) in enumerate(PICTURES.items()):
        pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    mask = Image.new("L", PICTURES["room"], 0)
    mask.paste(255, (4, 2, 10, 6))
    mask.save(folder / "mask.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def loaded(place: Path, name: str = "model") -> Any:
    """The model of a folder, as the command line reads it."""
    pipe = load_model(str(place / name), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def command(place: Path, out: Path, method: str, *more: Any) -> list[str]:
    argv = ["stylize", "--model", str(place / "model"), "--method", method, "--out", str(out)]
    argv += ["--prompts", str(place / "prompts.txt"), "--device", "cpu"]
    return [*argv, "--steps", "2", "--height", "16", "--width", "16", *map(str, more)]


def stylize(place: Path, out: Path, method: str, *more: Any) -> Any:
    """The pictures [n, h, w, 3]."""
    assert cli.main(command(place, out, method, *more)) == 0
    return opened(sorted(out.glob("0*.png")))


def opened(pictures: Any) -> Any:
    found = [Image.open(p) if not isinstance(p, Image.Image) else p for p in pictures]
    return np.stack([np.asarray(p.convert("RGB"), float) for p in found])


def same(a: Any, b: Any) -> bool:
    return bool(np.abs(a - b).max() <= 1)


def other(a: Any, b: Any) -> bool:
    """Every picture is another one."""
    return all(np.abs(x - y).max() > 1 for x, y in zip(a, b, strict=True))
