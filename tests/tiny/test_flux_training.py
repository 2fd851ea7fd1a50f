"""The parts of `tiny-flux` and their training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from styleattn.tiny import flux_model as parts
from styleattn.tiny.captions import MAX_TOKENS, words
from styleattn.tiny.drawings import CONTENTS
from styleattn.tiny.flux_sharing import FluxGroups, share_flux_in_groups
from styleattn.tiny.model import latents_of, new_tokenizer
from styleattn.tiny.train_flux import Run, Settings, encoded, make_batch, train

SMALL = Settings(seed=3, steps=4, batch=4, warmup=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return new_tokenizer(folder / "1"), parts.new_word_tokenizer(folder / "2")


@pytest.fixture(scope="module")
def denoiser(tokenizers: tuple[Any, Any]) -> Any:
    """One whose blocks do something: none of its weights is zero."""
    torch.manual_seed(0)
    model = parts.FluxDenoiser(*tokenizers).eval()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def inputs(denoiser: Any, tokenizers: tuple[Any, Any], rows: int = 4) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    prompts = ["a star", "a boat", "", "a drawing of a moon, dots candy inked"][:rows]
    text = denoiser.embed(*(encoded(t, prompts) for t in tokenizers))
    noisy = torch.randn(rows, parts.TOKENS, parts.CHANNELS, generator=generator)
    return noisy, torch.full((rows,), 0.6), torch.full((rows,), 2.0), text


@pytest.mark.parametrize(
    "changes", [{}, {"shared": 1.0, "aligned": 1.0, "guided": 1.0}], ids=["plain", "groups"]
)
def test_an_interrupted_run_reaches_the_same_weights(
    tmp_path: Path, changes: dict[str, float]
) -> None:
    settings = replace(SMALL, **changes)  # type: ignore[arg-type]
    whole = train(tmp_path / "whole", settings)
    train(tmp_path / "parts", settings, stop=2)
    again = train(tmp_path / "parts", settings)
    assert again.step == whole.step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for name, value in whole.mean.items():
        assert torch.equal(value, again.mean[name]), name


def test_the_loss_falls(tmp_path: Path) -> None:
    """On drawings that come later in the run."""
    run = Run(tmp_path, Settings(seed=1, steps=1000, batch=8, warmup=5, shared=0.5))

    def ahead() -> float:
        step, found = run.step, 0.0
        for run.step in (500, 501):
            with torch.no_grad():
                found += run.loss().item()
        run.step = step
        return found

    before = ahead()
    for _ in range(20):
        run.train_step()
    assert ahead() < 0.75 * before


def test_tokens_are_the_latents_as_the_pipeline_packs_them() -> None:
    from diffusers import FluxPipeline

    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    packed = FluxPipeline._pack_latents(latents_of(pictures), 2, 12, 16, 16)
    assert torch.equal(parts.tokens_of(pictures), packed)
    ids = FluxPipeline._prepare_latent_image_ids(2, 8, 8, torch.device("cpu"), torch.float32)
    assert torch.equal(parts.image_ids(), ids)
    flat = parts.tokens_of(torch.full((1, 3, 32, 32), 0.3))
    assert parts.without_means(flat).abs().max() < 1e-6
    one = parts.tokens_of(pictures[:1])
    blocks = pictures[0].unflatten(1, (8, 4)).unflatten(3, (8, 4)).permute(1, 3, 0, 2, 4)
    means = blocks.mean((3, 4), keepdim=True)
    wanted = (blocks - means).square().sum() * 1.5625**2
    torch.testing.assert_close(parts.without_means(one).square().sum(), wanted)


def test_every_word_is_one_token_of_both_tokenizers(tokenizers: tuple[Any, Any]) -> None:
    clip, t5 = tokenizers
    for word in words():
        assert len(clip(word).input_ids) == 3, word
        assert len(t5(f"a{word}" if word == "," else word).input_ids) == 2 + (word == ","), word
    ids = encoded(t5, ["a star, dots candy", "", "a zebra"])
    assert ids.shape == (3, MAX_TOKENS)
    assert ids[1].tolist() == [1] + [0] * (MAX_TOKENS - 1)
    assert t5.decode(ids[0], skip_special_tokens=True).replace(" ,", ",") == "a star, dots candy"
    assert 2 not in ids[2].tolist(), "letters, not unknown"
    styled = "a drawing of a house in diagonal desert glowing"
    assert int((encoded(t5, [styled]) != 0).sum()) <= MAX_TOKENS


def test_a_new_model_knows_places_and_contents(tokenizers: tuple[Any, Any]) -> None:
    """It predicts nothing yet; but what the first block adds to a token names its row and column,
    and the contents are as far apart as the noise levels are."""
    torch.manual_seed(0)
    model = parts.FluxDenoiser(*tokenizers)
    seen = []
    block = model.transformer.transformer_blocks[0]
    handle = block.attn.register_forward_hook(lambda m, i, output: seen.append(output[0]))
    with torch.no_grad():
        arguments = inputs(model, tokenizers)
        output = model(*arguments)
        time_text = model.transformer.time_text_embed
        contents = model.embed(*(encoded(t, [f"a {c}" for c in CONTENTS]) for t in tokenizers))[1]
        apart = time_text.text_embedder(contents).std(0).mean()
    handle.remove()
    assert output.shape == (4, parts.TOKENS, parts.CHANNELS) and not output.any()
    assert apart == pytest.approx(0.5, rel=1e-3)
    places = torch.cat([seen[0], torch.ones(4, parts.TOKENS, 1)], 2).double()
    wanted = parts.image_ids()[:, 1:].double()
    known = places[:3].flatten(0, 1)
    gram = known.T @ known + 10 * torch.eye(known.shape[1], dtype=torch.float64)
    fit = torch.linalg.solve(gram, known.T @ wanted.repeat(3, 1))
    assert (places[3] @ fit - wanted).abs().mean() < 1.2, "read off the last picture"


def test_without_groups_attention_is_the_stock_one(
    denoiser: Any, tokenizers: tuple[Any, Any]
) -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    arguments = inputs(denoiser, tokenizers)
    with torch.no_grad():
        denoiser.transformer.set_attn_processor(FluxAttnProcessor())
        stock = denoiser(*arguments)
        share_flux_in_groups(denoiser.transformer, FluxGroups())
        ours = denoiser(*arguments)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
def test_a_group_follows_its_first_row(
    denoiser: Any, tokenizers: tuple[Any, Any], aligned: bool
) -> None:
    """The first row is drawn as if alone; the others depend on it, and on no other row."""
    groups = FluxGroups()
    share_flux_in_groups(denoiser.transformer, groups)
    noisy, *rest = inputs(denoiser, tokenizers)

    def drawn(x: torch.Tensor, count: int) -> torch.Tensor:
        groups.count, groups.aligned = count, aligned
        with torch.no_grad():
            return denoiser(x, *rest)

    alone, shared = drawn(noisy, 0), drawn(noisy, 1)
    torch.testing.assert_close(shared[0], alone[0], rtol=1e-4, atol=1e-5)
    assert (shared[1:] - alone[1:]).abs().amax((1, 2)).min() > 1e-3
    other = noisy.clone()
    other[0] += 1
    assert (drawn(other, 1)[1:] - shared[1:]).abs().amax((1, 2)).min() > 1e-3
    other = noisy.clone()
    other[3] += 1
    torch.testing.assert_close(drawn(other, 1)[:3], shared[:3])
    halves = drawn(noisy, 2)
    torch.testing.assert_close(halves[1], shared[1])
    assert (halves[3] - shared[3]).abs().max() > 1e-3


def test_a_shared_layer_is_the_published_formula() -> None:
    """One single block's attention against softmax written out."""
    from styleattn.tiny import flux_sharing

    generator = torch.Generator().manual_seed(0)
    text, size, width = 3, 2, 32
    query, key, value = (
        torch.randn(size, 2, text + parts.TOKENS, width, generator=generator) + shift
        for shift in (0.5, -1.0, 0.0)
    )
    still = torch.ones(text + parts.TOKENS, width), torch.zeros(text + parts.TOKENS, width)
    found = flux_sharing._shared(FluxGroups(count=1), query, key, value, text, still)
    q, k, v = (x.double() for x in (query, key, value))
    for x in (q, k):
        image, first = x[1, :, text:], x[0, :, text:]
        mean, std = image.mean(1, keepdim=True), (image.var(1, keepdim=True) + 1e-5).sqrt()
        wanted = (first.var(1, keepdim=True) + 1e-5).sqrt()
        x[1, :, text:] = (image - mean) / std * wanted + first.mean(1, keepdim=True)
    keys = torch.cat([k[1], k[0, :, text:]], 1)
    values = torch.cat([v[1], v[0, :, text:]], 1)
    weights = torch.softmax(q[1] @ keys.transpose(1, 2) / width**0.5, -1)
    torch.testing.assert_close(found[1].double(), weights @ values, rtol=1e-5, atol=1e-5)


def test_batches_hold_groups_told_one_noise_level(tokenizers: tuple[Any, Any]) -> None:
    settings = Settings(batch=32, shared=1.0, shared_clean=0.5, dropped=0.5, guided=1.0)
    batch = make_batch(settings, 0, *tokenizers)
    assert batch.groups == 8 and batch.guided
    assert (batch.told.view(8, 4) == batch.told[::4, None]).all()
    assert (batch.levels <= batch.told).all()
    assert torch.equal(batch.counts == 0, batch.levels < batch.told)
    assert not batch.counts.view(8, 4)[:, 1:].eq(0).any() and 0 < batch.counts[::4].sum() < 8
    empty = (batch.ids_2[:, 0] == 1).float().mean()
    assert 0.1 < empty < 0.9
    again = make_batch(settings, 0, *tokenizers)
    assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.noise, again.noise)
    alone = make_batch(Settings(batch=16), 1, *tokenizers)
    assert alone.groups == 0 and len(set(alone.told.tolist())) == 16 and alone.counts.all()


def test_guidance_is_taught_as_the_difference_the_prompt_makes(tmp_path: Path) -> None:
    run = Run(tmp_path, replace(SMALL, guided=1.0))
    with torch.no_grad():
        for parameter in run.model.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    batch = make_batch(run.settings, 0, run.tokenizer, run.tokenizer_2)
    text = run.model.embed(batch.ids, batch.ids_2)
    added = run._guidance(batch, batch.noise, text)
    ones = torch.ones(4)
    nothing = run.model.embed(*(encoded(t, [""] * 4) for t in (run.tokenizer, run.tokenizer_2)))
    with torch.no_grad():
        first, second = (run.model(batch.noise, batch.told, ones, t) for t in (text, nothing))
    wanted = first + added - second
    torch.testing.assert_close(
        wanted, batch.guidance[:, None, None] * (first - second), rtol=1e-4, atol=1e-5
    )
    assert added.abs().max() > 1e-3


def test_an_exported_run_is_an_ordinary_flux_pipeline(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    from styleattn.tiny import path
    from styleattn.tiny.export import export

    train(tmp_path / "run", SMALL, stop=1)
    export(tmp_path / "run", path() / "vae", tmp_path / "model", "tiny-flux")
    pipe = FluxPipeline.from_pretrained(str(tmp_path / "model"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        "a star", height=32, width=32, num_inference_steps=2, max_sequence_length=16
    ).images[0]
    assert picture.size == (32, 32)
    weights = pipe.transformer.state_dict()
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["mean"]
    for name, value in weights.items():
        assert torch.equal(value, kept[f"transformer.{name}"].half().float()), name
