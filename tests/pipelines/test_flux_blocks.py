"""The measure of FLUX blocks: which blocks are asked, and what is made of their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import random_flux
from PIL import Image
from safetensors.torch import save_file

from styleattn import tiny
from styleattn.pipelines import flux_blocks
from styleattn.pipelines.flux_blocks import Likeness, Row, Setup, Truth, block_groups, table
from styleattn.pipelines.sampling import Sampling, generate
from styleattn.processors._layers import layer_weights
from styleattn.tiny.drawings import draw
from styleattn.tiny.trials import trials

FLUX = [f"transformer_blocks.{i}.attn" for i in range(19)]
FLUX += [f"single_transformer_blocks.{i}.attn" for i in range(38)]
SMALL = [*FLUX[:2], *FLUX[19:23]]


def test_every_block_is_asked_alone_and_left_out() -> None:
    groups = {group.name: list(group.weights) for group in block_groups(SMALL)}
    blocks = [name.removesuffix(".attn") for name in SMALL]
    assert groups["none"] == [] and groups["all"] == blocks
    assert groups["double"] == blocks[:2] and groups["single"] == blocks[2:]
    for name, block in zip(
        ("double 0", "double 1", *(f"single {i}" for i in range(4))), blocks, strict=True
    ):
        assert groups[name] == [block]
        assert groups[f"all but {name}"] == [b for b in blocks if b != block]
    assert len(groups) == 4 + 2 * 6


def test_runs_of_many_blocks_cover_each_once() -> None:
    groups = block_groups(FLUX, parts=4)
    runs = [g for g in groups if "-" in g.name and not g.name.startswith("all")]
    assert [g.name for g in runs][:2] == ["double 0-4", "double 5-9"] and len(runs) == 8
    assert [b for g in runs for b in g.weights] == [name.removesuffix(".attn") for name in FLUX]
    assert all(set(g.weights.values()) <= {1.0} for g in groups)


class Drawer:
    """Draws what it is told to with the drawing module, in place of a model."""

    def __init__(self, style: bool, leak: bool) -> None:
        self.style, self.leak = style, leak
        self.trials = {id(t.reference.image): t for t in trials(8)}

    def draw(self, picture: Any, prompts: Any, seeds: Any, weights: Any) -> list[Image.Image]:
        trial = self.trials.get(id(picture))
        assert trial is not None and len(prompts) == len(seeds) == 4
        style = trial.reference.style
        if not self.style:
            textures, palettes = ("rows", "columns"), ("ember", "ocean")
            style = type(style)(
                textures[style.texture == "rows"], palettes[style.palette == "ember"], style.edge
            )
        contents = [p.removeprefix("a ") or "star" for p in prompts]
        if self.leak:
            contents = [trial.reference.content] * 4
        rngs = [np.random.default_rng([seed, 5]) for seed in seeds]
        return [Image.fromarray(draw(c, style, rng)) for c, rng in zip(contents, rngs, strict=True)]


def test_the_truth_tells_style_content_and_leakage_apart() -> None:
    drawer = Drawer(style=True, leak=False)
    judge = Truth(list(drawer.trials.values()))
    found = judge(drawer, {})  # type: ignore[arg-type]
    assert found["style"] == found["palette"] == found["texture"] == 1.0
    assert found["content"] == 1.0 and found["leakage"] == 0.0
    contents = [t.reference.content for t in judge.trials]
    wanted = sum(c == "star" for c in contents) / len(contents)
    assert found["reference's content, no prompt"] == wanted
    drawer.style, drawer.leak = False, True
    found = judge(drawer, {})  # type: ignore[arg-type]
    assert found["style"] == 0.0 and found["content"] == 0.0
    assert found["leakage"] == found["reference's content, no prompt"] == 1.0


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A random FLUX with an adapter of XLabs' layout in a file."""
    pipe = random_flux.flux()
    pipe.default_sample_size = 16
    parts = random_flux.ip_adapter(pipe.transformer)
    tensors = {f"image_proj.{n}": t for n, t in parts["image_proj"].items()}
    tensors |= {f"ip_adapter.{n}": t for n, t in parts["ip_adapter"].items()}
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_file(tensors, path)
    return Setup(pipe, path, random_flux.clip_vision(), Sampling(2, 3.5, None, 16, 16), 2.0)


def test_pictures_are_drawn_with_scaled_weights(setup: Setup) -> None:
    from styleattn import Reference, apply
    from styleattn.methods import IPAdapter

    block = "transformer_blocks.1"
    found = setup.draw(random_flux.PICTURE, ["a cat"], [3], {block: 0.5})
    plain = setup.draw(random_flux.PICTURE, ["a cat"], [3], {})
    method = IPAdapter(
        adapter=setup.adapter,
        image_encoder=setup.image_encoder,
        layers=block,
        references=(Reference(image=random_flux.PICTURE),),
    )
    with apply(setup.pipe, method):
        wanted = generate(setup.pipe, ["a cat"], [3], setup.sampling)
    assert np.array_equal(*(np.asarray(x[0]) for x in (found, wanted)))
    assert not np.array_equal(*(np.asarray(x[0]) for x in (found, plain)))


class Colours:
    """Stands for CSD: the mean colour is the style, its order turned round the content."""

    last_layer_style = torch.zeros(1)

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float()

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean = pixels.mean((2, 3)) - 0.5
        return mean, mean.flip(1), mean


def test_likeness_compares_with_the_reference_and_with_the_plain_picture() -> None:
    red, green = (Image.new("RGB", (8, 8), c) for c in ((255, 128, 128), (128, 255, 128)))
    plain, turned = (
        Image.new("RGB", (8, 8), (255, 128, 128)),
        Image.new("RGB", (8, 8), (0, 128, 128)),
    )

    class Painter:
        def draw(self, picture: Any, prompts: Any, seeds: Any, weights: Any) -> list[Any]:
            assert list(seeds) == [7, 8] and prompts == ["a", "b"]
            return [turned if weights else plain] * 2

    judge = Likeness(Colours(), [red, green], ["a", "b"], 7)  # type: ignore[arg-type]
    none = judge(Painter(), {})  # type: ignore[arg-type]
    assert none["content kept"] == pytest.approx(1, abs=1e-3)
    assert none["style"] == none["leakage"] == pytest.approx(0.5, abs=0.01)
    some = judge(Painter(), {"x": 1.0})  # type: ignore[arg-type]
    assert some["content kept"] == pytest.approx(-1, abs=1e-3)
    assert some["style"] == some["leakage"] == pytest.approx(-0.5, abs=0.01)


def test_the_table_is_in_hundredths() -> None:
    rows = [
        Row("none", {}, {"style": 0.031, "content": 1.0}),
        Row("all", {}, {"style": 0.5, "content": 0.987}),
    ]
    assert table(rows) == (
        "| blocks | style | content |\n| --- | --- | --- |\n| none | 3 | 100 |\n| all | 50 | 99 |\n"
    )


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr("sys.argv", ["flux_blocks", *argv])
    flux_blocks.main()


def test_models_of_ones_own_need_a_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", "flux/", "--csd", "csd.pth")
    error = capsys.readouterr().err
    assert "flux/ is measured with --adapter, --image-encoder, --reference, --prompts" in error
    assert "--csd" not in error.splitlines()[-1]


ROOT = Path(__file__).resolve().parents[2]


def record() -> list[Row]:
    found = json.loads((tiny.adapter_path() / "blocks.json").read_text("utf-8"))
    return [Row(**row) for row in found]


def test_the_page_shows_what_was_measured() -> None:
    page = (ROOT / "docs" / "flux-presets.md").read_text("utf-8")
    assert table(record()) in page


def test_the_presets_are_what_the_record_says() -> None:
    """The rule of the page: of the blocks alone, those that reach half of the style match of all
    blocks are style."""
    rows = {row.name: row for row in record()}
    everywhere = rows["all"].found["style"]
    alone = [row for row in rows.values() if len(row.weights) == 1]
    wanted = {b for row in alone for b in row.weights if row.found["style"] >= everywhere / 2}
    weights = layer_weights("style", SMALL)
    assert {name.removesuffix(".attn") for name, w in weights.items() if w} == wanted
    assert set(weights.values()) <= {0.0, 1.0}


def test_a_group_of_tiny_flux_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    options = ("--count", "4", "--steps", "2", "--groups", "none", "double 0")
    run(monkeypatch, *options, "--json", str(tmp_path / "found.json"))
    rows = [Row(**row) for row in json.loads((tmp_path / "found.json").read_text("utf-8"))]
    assert [list(row.weights) for row in rows] == [[], ["transformer_blocks.0"]]
    assert table(rows) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, "--count", "4", "--groups", "double 7")
    assert "no groups double 7; there are none, all," in capsys.readouterr().err
