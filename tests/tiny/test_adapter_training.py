"""The image adapters of the embedded models and their training."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from PIL import Image

from styleattn import Reference, apply, tiny
from styleattn.methods import IPAdapter
from styleattn.processors.flux import joint_attention_layers
from styleattn.tiny import train_adapter
from styleattn.tiny.adapter_model import READ, Batch, save_image_prompts
from styleattn.tiny.export import export_adapter
from styleattn.tiny.flux_adapter import FluxHost, block_names
from styleattn.tiny.flux_model import tokens_of
from styleattn.tiny.model import latents_of
from styleattn.tiny.sdxl_adapter import SdxlHost, host_layers
from styleattn.tiny.train_adapter import Run, Settings, make_batch, train

SMALL = Settings(seed=3, steps=4, batch=4, warmup=2)
MODELS = ("tiny-flux", "tiny-sdxl")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whose weights are what a file in half precision holds."""
    made = Run(tmp_path_factory.mktemp("run"), replace(SMALL, model=request.param))
    with torch.no_grad():
        for parameter in made.model.adapter.parameters():
            parameter.copy_(parameter.half())
    return made


def denoiser(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def prediction(host: Any, batch: Batch) -> torch.Tensor:
    """What the model of a host makes of noise."""
    if isinstance(host, FluxHost):
        return host.velocity(batch.noise.view_as(tokens_of(batch.drawn)), batch)
    noise = batch.noise.view_as(latents_of(batch.drawn))
    return host.clean(noise, torch.full([len(noise)], 900), batch)


@pytest.mark.parametrize("model", MODELS)
def test_an_interrupted_run_reaches_the_same_weights(tmp_path: Path, model: str) -> None:
    settings = replace(SMALL, model=model)
    whole = train(tmp_path / "whole", settings)
    train(tmp_path / "parts", settings, stop=2)
    again = train(tmp_path / "parts", settings)
    assert again.step == whole.step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for name, value in whole.mean.items():
        assert torch.equal(value, again.mean[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_only_the_adapter_and_its_encoder_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """On one batch again and again the loss falls; the model stays as it is in the package."""
    run = Run(tmp_path, replace(SMALL, model=model, steps=100, lr=3e-3))
    first = {name: value.clone() for name, value in run.model.state_dict().items()}
    batch = make_batch(replace(run.settings, shift=20.0), 0)
    monkeypatch.setattr(train_adapter, "make_batch", lambda settings, step: batch)
    losses = [run.train_step() for _ in range(16)]
    assert losses[-1] < 0.85 * losses[0]
    stock = denoiser(tiny.load(model)).state_dict()
    for name, value in denoiser(run.host.pipe).state_dict().items():
        if ".processor." not in name:
            assert torch.equal(value, stock[name]), name
    changed = {
        name for name, value in run.model.state_dict().items() if (value != first[name]).any()
    }
    assert changed >= {
        name for name, _ in run.model.named_parameters() if "k_proj.bias" not in name
    }


def test_batches_show_what_is_drawn_or_another_content_in_its_style() -> None:
    from styleattn.tiny.measure import read

    def shown(batch: Any) -> list[Any]:
        pixels = ((batch.pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return read(list(pixels.numpy()))

    same = make_batch(Settings(batch=8, same=1.0, dropped=0.0, styled=0.0, unseen=0.0), 1)
    assert same.seen.all() and all(same.prompts)
    for reading, prompt, classes in zip(shown(same), same.prompts, same.classes, strict=True):
        assert reading.content in prompt
        seen = (reading.content, reading.texture, reading.palette, reading.edge)
        assert seen == tuple(names[c] for names, c in zip(READ, classes, strict=True))
    other = make_batch(Settings(batch=8, same=0.0, dropped=0.0, styled=1.0, unseen=0.5), 1)
    assert 0 < other.seen.sum() < 8
    for reading, prompt in zip(shown(other), other.prompts, strict=True):
        assert reading.content not in prompt
        assert reading.texture in prompt and reading.palette in prompt
    again = make_batch(Settings(batch=8, same=0.0, dropped=0.0, styled=1.0, unseen=0.5), 1)
    assert torch.equal(other.drawn, again.drawn) and torch.equal(other.noise, again.noise)
    assert not any(make_batch(Settings(batch=8, dropped=1.0), 1).prompts)


def test_the_file_has_the_names_of_published_ones(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_image_prompts(run.model, run.host.places(run.model.adapter), tmp_path)
    projector = {f"image_proj.{n}" for n in ("norm.weight", "norm.bias")}
    if isinstance(run.host, FluxHost):
        layers = list(joint_attention_layers(run.host.pipe.transformer))
        projector |= {f"image_proj.proj.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
        indices = range(len(layers))
        assert layers == block_names()
    else:
        projector |= {"image_proj.proj.weight", "image_proj.proj.bias"}
        indices = range(1, 2 * len(host_layers()), 2)
    pairs = {f"ip_adapter.{i}.to_{p}_ip.weight" for i in indices for p in "kv"}
    found = load_file(tmp_path / "adapter.safetensors")
    assert set(found) == projector | pairs
    assert {t.dtype for t in found.values()} == {torch.float16}
    encoder = load_file(tmp_path / "image_encoder" / "model.safetensors")
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in encoder)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 2e6


def test_training_sees_pictures_as_the_method_does(run: Run, tmp_path: Path) -> None:
    """The saved adapter through `apply`, the picture through its encoder, against what a training
    step predicts."""
    save_image_prompts(run.model, run.host.places(run.model.adapter), tmp_path)
    batch = make_batch(replace(SMALL, batch=2, unseen=0.0, dropped=0.0), 0)
    pixels = batch.pictures[:1]
    shape = np.asarray(((pixels[0] + 1) * 127.5).round().byte().permute(1, 2, 0))
    stock = type(run.host)()
    with torch.no_grad():
        run.host.shown.tokens = None
        plain = prediction(run.host, batch)
        tokens = run.model.tokens(run.model.embed(pixels), torch.ones(1))
        run.host.shown.tokens = tokens.expand(2, -1, -1)
        trained = prediction(run.host, batch)
        method = IPAdapter(
            adapter=tmp_path,
            image_encoder=tmp_path / "image_encoder",
            references=(Reference(image=Image.fromarray(shape)),),
        )
        untouched = prediction(stock, batch)
        with apply(stock.pipe, method) as handle:
            called = nullcontext() if isinstance(stock, FluxHost) else handle.layout(chunks=1)
            with called:
                drawn = prediction(stock, batch)
    torch.testing.assert_close(plain, untouched, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn, trained, rtol=1e-5, atol=1e-5)
    assert (trained - plain).abs().max() > 1e-2


def test_diffusers_reads_the_adapter_of_tiny_sdxl(run: Run, tmp_path: Path) -> None:
    """The written file, read and run by diffusers' own IP-Adapter, against a training step."""
    if not isinstance(run.host, SdxlHost):
        pytest.skip("diffusers reads XLabs' layout only for FLUX")
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    save_image_prompts(run.model, run.host.places(run.model.adapter), tmp_path)
    batch = make_batch(replace(SMALL, batch=2, unseen=0.0, dropped=0.0), 0)
    stock = type(run.host)()
    pipe = stock.pipe
    encoder = CLIPVisionModelWithProjection.from_pretrained(str(tmp_path / "image_encoder"))
    size = {"height": 32, "width": 32}
    pipe.register_modules(
        image_encoder=encoder.eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
    )
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="adapter.safetensors")
    shown = ((batch.pictures[:1] + 1) * 127.5).round().byte()[0].permute(1, 2, 0).numpy()
    with torch.no_grad():
        tokens = run.model.tokens(run.model.embed(batch.pictures[:1]), torch.ones(1))
        run.host.shown.tokens = tokens.expand(2, -1, -1)
        trained = prediction(run.host, batch)
        embeds, _ = pipe.encode_image(Image.fromarray(shown), "cpu", 1)
        forward = pipe.unet.forward

        def with_picture(*args: Any, added_cond_kwargs: dict[str, Any], **kwargs: Any) -> Any:
            added = {**added_cond_kwargs, "image_embeds": [embeds[None].expand(2, -1, -1)]}
            return forward(*args, added_cond_kwargs=added, **kwargs)

        pipe.unet.forward = with_picture
        drawn = prediction(stock, batch)
    torch.testing.assert_close(drawn, trained, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_picture_sees_an_embedding_of_zeros(run: Run) -> None:
    pictures = make_batch(SMALL, 0).pictures[:2]
    with torch.no_grad():
        first, second = run.model.tokens(run.model.embed(pictures), torch.tensor([1.0, 0.0]))
        blank = run.model.adapter.tokens(torch.zeros(1, 64))[0]
    torch.testing.assert_close(second, blank, rtol=1e-5, atol=1e-6)
    assert (first - blank).abs().max() > 1e-2


def test_the_heads_are_wrong_by_the_cross_entropy_of_each(run: Run) -> None:
    embeds, classes = torch.randn(3, 64), torch.tensor([[0, 5, 2, 1]] * 3)
    with torch.no_grad():
        found = run.model.misread(embeds, classes)
        logs = [torch.log_softmax(head(embeds), -1) for head in run.model.heads]
    wanted = -sum(log[:, c].mean() for log, c in zip(logs, classes[0], strict=True))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_is_exported_with_its_averaged_weights(tmp_path: Path, model: str) -> None:
    from safetensors.torch import load_file

    run = train(tmp_path / "run", replace(SMALL, model=model), stop=2)
    export_adapter(tmp_path / "run", tmp_path / "out", f"{model}-ip-adapter")
    found = load_file(tmp_path / "out" / "adapter.safetensors")
    wanted = run.mean["adapter.projector.norm.weight"].half()
    assert torch.equal(found["image_proj.norm.weight"], wanted)
    assert (tmp_path / "out" / "training.json").is_file()
    assert not (tmp_path / "out.new").exists()
