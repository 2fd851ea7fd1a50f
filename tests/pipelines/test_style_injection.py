"""StyleID from two pictures, and the recipe's command line."""

from __future__ import annotations

import json

import injection_oracles as papers
import numpy as np
import pytest
import torch
from PIL import Image

from styleattn.inversion import Trajectory, ddim_invert, encode_picture, encode_prompts
from styleattn.inversion.host import decode_latents, noise_function
from styleattn.methods import StyleID
from styleattn.pipelines import Inversion, Job, Sampling, Source, run_folder
from styleattn.pipelines.drawing import adain

STEPS = 4
LAYERS = ("up_blocks.0.attentions.1.",)
ROWS = Inversion(1.0, "consistent", 0)


@pytest.fixture(scope="module")
def pipe(hosts):
    return hosts.sdxl(scheduler=hosts.ddim(steps_offset=1))


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def clean(pipe):
    return [encode_picture(pipe, picture(i), 32, 32)[None] for i in (1, 2)]


def made(pipe, tmp_path, method, **job):
    job = Job(("",), method, Sampling(STEPS, 1.0), ROWS, **job)
    contents, styles = [Source(picture(1), name="boat")], [Source(picture(2))]
    manifest = run_folder(pipe, job, tmp_path, sources=styles, contents=contents)
    return np.asarray(Image.open(tmp_path / "0000-boat.png"), float), manifest


def move(x, eps, source, target):
    """DDIM between two levels of alpha-bar, written out."""
    clean = (x - (1 - source) ** 0.5 * eps) / source**0.5
    return target**0.5 * clean + (1 - target) ** 0.5 * eps


def network(pipe, rows=1):
    """The noise of rows that are told the empty prompt, without guidance."""
    return noise_function(pipe, encode_prompts(pipe, [""] * rows), 1.0, 32, 32)


def written_out(pipe, clean, published):
    """StyleID in plain loops: inversion, AdaIN of the noise, three rows at every step."""
    alphas = pipe.scheduler.alphas_cumprod.tolist()
    final = float(pipe.scheduler.final_alpha_cumprod)
    stride = 1000 // STEPS
    labels = [1 + stride * i for i in range(STEPS)]
    paths, eps = [], network(pipe)
    for x in clean:
        if published:  # the data stands at the first label; the end is the last training step
            path = {labels[0]: x}
            for t, after in zip(labels, [*labels[1:], 999], strict=True):
                path[after] = x = move(x, eps(x, t), alphas[t], alphas[after])
        else:
            path, level, seen = {}, final, 0
            for t in labels:
                path[t] = x = move(x, eps(x, seen), level, alphas[t])
                level, seen = alphas[t], t
        paths.append(path)
    start = 999 if published else labels[-1]
    x = papers.adain(paths[0][start], paths[1][start])
    run = labels[::-1][1:] if published else labels[::-1]
    eps = network(pipe, 3)
    with papers.styled(pipe.unet, dict.fromkeys(LAYERS, papers.style_id()), chunks=1):
        for t in run:
            rows = torch.cat([paths[0][t], paths[1][t], x])
            before = alphas[t - stride] if t > stride else final
            x = move(x, eps(rows, t)[2:], alphas[t], before)
    return np.asarray(decode_latents(pipe, x)[0], float)


@pytest.mark.parametrize("compat", ["", "paper-code"])
def test_end_to_end(pipe, clean, tmp_path, compat):
    """The whole recipe against plain loops; the authors' schedule skips the noisiest step and
    starts noisier than its label."""
    out, manifest = made(pipe, tmp_path, StyleID(compat=compat))
    expected = written_out(pipe, clean, bool(compat))
    assert np.abs(out - expected).max() <= 1  # of 255: rounding to bytes
    assert manifest["complete"] and manifest["contents"][0]["name"] == "boat"
    assert manifest["contents"][0]["labels"] == ("style_id" if compat else "consistent")
    other = written_out(pipe, clean, not compat)
    assert np.abs(out - other).max() > 5


def test_the_published_schedule_starts_at_the_end_of_the_noise_schedule(pipe, clean):
    found = ddim_invert(
        pipe, clean[0], "", num_inference_steps=STEPS, guidance_scale=1.0, labels="style_id"
    )
    alphas = pipe.scheduler.alphas_cumprod.double()
    assert found.timesteps.tolist() == [751, 501, 251, 1]
    assert float(found.alphas[0]) == float(alphas[999]) < float(alphas[751])
    assert torch.equal(found.latents[-1], clean[0][0]) and torch.equal(
        found.latents[-2], clean[0][0]
    )


def test_adain_of_latents():
    x, style = torch.randn(2, 4, 8, 8).unbind()
    out = adain(2 * x + 3, style)
    expected = papers.adain((2 * x + 3)[None], style[None])[0]
    assert torch.allclose(out, expected, atol=1e-5)
    mixed = [
        0.3 * s + 0.7 * c
        for s, c in zip(
            (style.mean((1, 2)), style.std((1, 2))),
            ((2 * x + 3).mean((1, 2)), (2 * x + 3).std((1, 2))),
            strict=True,
        )
    ]
    found = adain(2 * x + 3, style, 0.3)
    assert torch.allclose(found.mean((1, 2)), mixed[0], atol=1e-5)
    assert torch.allclose(found.std((1, 2)), mixed[1], atol=1e-5)
    assert torch.allclose(adain(x, style, 0.0), x, atol=1e-6)
    x[0] = 5.0  # a channel without variance
    assert torch.allclose(adain(x, style)[0], style[0].mean().expand(8, 8), atol=1e-5)


def test_it_resumes(pipe, tmp_path):
    """Inversions and pictures that are there are left alone; the style is an image of its own."""
    first, manifest = made(pipe, tmp_path, StyleID())
    names = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sum(name.startswith("content-") for name in names) == 1
    again, manifest = made(pipe, tmp_path, StyleID())
    assert manifest["pictures"][0]["found"] and np.array_equal(first, again)
    kept = [n for n in names if n.endswith(".safetensors") or n.startswith("0")]
    assert all((tmp_path / n).stat().st_mtime_ns == names[n] for n in kept)
    other, manifest = made(pipe, tmp_path, StyleID(gamma=0.2))
    assert not manifest["pictures"][0]["found"] and not np.array_equal(first, other)


def test_without_a_content_picture(pipe, tmp_path):
    job = Job(("",), StyleID(), Sampling(STEPS, 1.0), ROWS)
    with pytest.raises(ValueError, match="style_id needs a content picture"):
        run_folder(pipe, job, tmp_path / "out", sources=[Source(picture(2))])
    assert not (tmp_path / "out").exists()


def test_command_line(pipe, tmp_path, capsys):
    from styleattn import cli

    pipe.save_pretrained(tmp_path / "model")
    for name, seed in (("boat", 1), ("tree", 3), ("style", 2)):
        picture(seed).save(tmp_path / f"{name}.png")
    argv = ["stylize", "--model", str(tmp_path / "model"), "--method", "style_id", "--steps", "3"]
    argv += ["--reference", str(tmp_path / "style.png"), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "--content is missing: style_id restyles a picture" in capsys.readouterr().err
    for name in ("boat", "tree"):
        argv += ["--content", str(tmp_path / f"{name}.png")]
    assert cli.main([*argv, "--set", "gamma=0.3", "--device", "cpu"]) == 0
    assert "2 of 2 pictures" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
    assert names == ["0000-boat.png", "0001-tree.png"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["sampling"]["guidance_scale"] == 1.0
    assert manifest["settings"]["inversion"]["labels"] == "consistent"
    assert manifest["settings"]["method"]["gamma"] == 0.3
    assert cli.main([*argv, "--method", "style_aligned"]) == 2
    assert "style_aligned takes no --content" in capsys.readouterr().err


@pytest.mark.parametrize("compat", ["", "paper-code"])
def test_features_are_kept_for_further_runs(pipe, tmp_path, compat):
    """Rows and kept features give one picture; another gamma finds them, another style its own."""
    from styleattn import cli

    pipe.save_pretrained(tmp_path / "model")
    for name, seed in (("boat", 1), ("style", 2), ("other", 3)):
        picture(seed).save(tmp_path / f"{name}.png")

    def draw(out, style, *more):
        argv = ["stylize", "--model", str(tmp_path / "model"), "--method", "style_id"]
        argv += ["--content", str(tmp_path / "boat.png"), "--steps", "3", "--device", "cpu"]
        argv += ["--reference", str(tmp_path / f"{style}.png"), "--out", str(tmp_path / out)]
        argv += ["--set", f"compat={compat!r}"]
        argv += ["--labels", "style_id"] if compat else []
        assert cli.main([*argv, *more]) == 0
        return np.asarray(Image.open(tmp_path / out / "0000-boat.png"), float)

    kept = ["--features", str(tmp_path / "kept")]
    assert np.abs(draw("a", "style") - draw("b", "style", *kept)).max() <= 1
    (folder,) = (tmp_path / "kept").iterdir()
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    strong = draw("c", "style", *kept, "--set", "gamma=0.2")
    assert np.abs(strong - draw("d", "style", "--set", "gamma=0.2")).max() <= 1
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    draw("e", "other", *kept)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    draw("f", "other", *kept, "--set", "layers=all")
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_the_contents_own_statistics(pipe, tmp_path):
    """Without the style's statistics the run starts from the content's noise as it is."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].clone()), with_kwargs=True, prepend=True
    )
    try:
        made(pipe, tmp_path, StyleID(style_statistics=0.0))
    finally:
        hook.remove()
    content = Trajectory.load(next(tmp_path.glob("content-*.safetensors")))
    assert torch.allclose(seen[-STEPS][0], content.latents[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"style_statistics must lie in \[0, 1\]"):
        StyleID(style_statistics=1.5)
