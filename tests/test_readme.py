"""What README and CONTRIBUTING say is there, is there; their examples run."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from random_pipelines import BETAS, sdxl

import styleattn
from styleattn.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page("README.md"), flags=re.DOTALL)


def test_pipeline_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a random pipeline of a few kilobytes, in place of the one that README downloads."""
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")  # SDXL's
    pipe = sdxl(scheduler)
    before = dict(pipe.unet.attn_processors)
    loader = diffusers.StableDiffusionXLPipeline
    monkeypatch.setattr(loader, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.setattr(loader, "to", lambda self, device: self)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((32, 32), 64).convert("RGB").save("picture.png")
    names: dict = {}
    first, second, _ = blocks("python")
    exec(first, names)
    assert len(names["images"]) == 3
    assert all(pipe.unet.attn_processors[name] is found for name, found in before.items())
    exec(second.replace("=50", "=6"), names)
    assert len(names["images"]) == 2
    assert all(pipe.unet.attn_processors[name] is found for name, found in before.items())
    assert styleattn.StyleBank.load("style.safetensors").nbytes == names["bank"].nbytes


def test_operation_example() -> None:
    names = {name: torch.randn(2, 3, 5, 8) for name in ("query", "key", "value")}
    names |= {name: torch.randn(1, 3, 7, 8) for name in ("style_key", "style_value")}
    exec(blocks("python")[2], {"styleattn": styleattn}, names)
    assert names["out"].shape == (2, 3, 5, 8)
    assert names["lse"].shape == (1, 2, 3, 5)


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"\bmake ([a-z]+)\b", page(name))) <= targets
    assert set(re.findall(r"^styleattn ([a-z]+)", page(name), flags=re.MULTILINE)) <= commands


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page(name)):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_tables_are_complete() -> None:
    text = page("README.md")
    for method in styleattn.METHODS.values():
        assert f"| {method.__name__} |" in text
    for row in styleattn.backends():
        assert f"| `{row.name}` |" in text
