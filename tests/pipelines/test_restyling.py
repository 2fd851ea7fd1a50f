"""The recipes of the attention-injection methods: each a command line with a picture in and a
picture out."""

from __future__ import annotations

import json

import injection_oracles as papers
import numpy as np
import pytest
import torch
from PIL import Image

from styleattn import cli
from styleattn.methods import CrossImageAttention, VisualStylePrompting, ZStar
from styleattn.pipelines import Inversion, Job, Sampling, Source, run_folder
from styleattn.pipelines.recipes import RECIPES
from styleattn.pipelines.restyling import levels
from styleattn.references import Reference

STEPS = 5
ROWS = Inversion(1.0, "consistent", 0)


@pytest.fixture(scope="module")
def pipe(hosts):
    return hosts.sdxl()


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return str(folder)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)


METHODS = ("visual_style_prompting", "z_star", "cross_image_attention", "mutual_attention")


@pytest.mark.parametrize("method", [*METHODS, "reference_only"])
def test_command_line(model, tmp_path, capsys, method):
    """A picture in, a picture out, and again from the folder."""
    recipe = RECIPES[method]
    picture(1).save(tmp_path / "boat.png")
    picture(2).save(tmp_path / "style.png")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    argv = ["stylize", "--model", model, "--method", method, "--device", "cpu", "--steps", "3"]
    argv += ["--out", str(tmp_path / "out")]
    argv += ["--content", str(tmp_path / "boat.png")] if recipe.content else []
    argv += ["--prompts", str(tmp_path / "prompts.txt")] if recipe.prompts else []
    if "style" in recipe.roles:
        argv += ["--reference", str(tmp_path / "style.png")]
    assert cli.main(argv) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["settings"]["method"]["method"] == method
    assert len(manifest["contents"]) == recipe.content
    kind = "noise" if method == "reference_only" else "ddim"
    assert manifest["settings"]["inversion"]["kind"] == kind
    found = list((tmp_path / "out").glob("0000-*.png"))
    assert len(found) == 1 and (tmp_path / "out" / "contact_sheet.png").exists()
    assert cli.main(argv) == 0
    assert "0 of 1 pictures made" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["renoise", "belm", "noise"])
def test_inversions_are_selectable(pipe, tmp_path, kind):
    job = Job(
        ("a cat",),
        VisualStylePrompting(),
        Sampling(STEPS, 3.0),
        Inversion(1.0, "consistent", 0, kind),
    )
    manifest = run_folder(pipe, job, tmp_path, sources=[Source(picture(2), "a boat")])
    assert manifest["complete"] and manifest["settings"]["inversion"]["kind"] == kind
    with pytest.raises(ValueError, match="unknown inversion 'edict'"):
        Inversion(kind="edict")


class Recorder:
    """A network's inputs, call by call."""

    def __init__(self, unet):
        self.seen = []
        self.hook = unet.register_forward_pre_hook(self.note, with_kwargs=True, prepend=True)

    def note(self, module, args, kwargs):
        self.seen.append((args[0] if args else kwargs["sample"]).clone())


def rows_of_the_run(pipe, method, tmp_path):
    """What the network sees of the picture at every step of the last run, and the trajectories."""
    job = Job(("",), method, Sampling(STEPS, 1.0), ROWS)
    arguments = {"sources": [Source(picture(2))], "contents": [Source(picture(1), name="boat")]}
    recorder = Recorder(pipe.unet)
    try:
        run_folder(pipe, job, tmp_path, **arguments)
    finally:
        recorder.hook.remove()
    return torch.stack([rows[-1] for rows in recorder.seen[-STEPS:]]), tmp_path


def test_z_star_is_pulled_to_the_content(pipe, tmp_path):
    """x_t = 0.99 x_t + 0.01 of the content's before every step but the first."""
    from styleattn.inversion import Trajectory
    from styleattn.pipelines import restyling

    seen, folder = rows_of_the_run(pipe, ZStar(steps=(0.0, 0.0)), tmp_path / "a")
    content = Trajectory.load(next(folder.glob("content-*.safetensors")))
    assert torch.allclose(seen[0], content.latents[0], atol=1e-5)
    before, restyling.PULL = restyling.PULL, 0.0
    try:
        free, _ = rows_of_the_run(pipe, ZStar(steps=(0.0, 0.0)), tmp_path / "b")
    finally:
        restyling.PULL = before
    expected = 0.99 * free[1] + 0.01 * content.latents[1]
    assert torch.allclose(seen[1], expected, atol=1e-5)


def test_cross_image_matches_the_appearance_from_a_fifth_on(pipe, tmp_path):
    """AdaIN of the latents to the appearance's at the same level."""
    from styleattn.references import StyleBank

    seen, folder = rows_of_the_run(pipe, CrossImageAttention(), tmp_path)
    style = StyleBank.load(folder / "reference.safetensors").latents[0]
    for step in range(1, STEPS):
        expected = papers.adain(seen[step][None], style[step][None])[0]
        assert torch.allclose(seen[step], expected, atol=1e-4)  # already matched: no change
    assert not torch.allclose(seen[0], papers.adain(seen[0][None], style[0][None])[0], atol=1e-2)


def test_two_levels_of_cross_image_attention(hosts):
    deep = hosts.sdxl(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 1),
    )
    found = levels(deep, CrossImageAttention(), 100)
    assert [m.layers for m in found] == ["up_blocks.0.*", "up_blocks.1.*"]
    assert [m.steps for m in found] == [(0.1, 0.7), (0.1, 0.9)]
    assert [i for i, used in enumerate(found[0].references[0].steps) if used] == list(
        range(0, 40, 5)
    )
    mine = CrossImageAttention(layers="all", references=(Reference(weight=0.0), Reference()))
    assert levels(deep, mine, 100) == (mine,)
