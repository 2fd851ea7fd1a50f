"""Training: a function of its seed, also across an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from styleattn.tiny.model import latents_of, new_tokenizer, pictures_of
from styleattn.tiny.optim import orthogonalized
from styleattn.tiny.train import Run, Settings, make_batch, rate, train

SMALL = Settings(seed=3, steps=4, batch=4, warmup=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_an_interrupted_run_reaches_the_same_weights(tmp_path: Path, shared: float) -> None:
    settings = replace(SMALL, shared=shared)
    whole = train(tmp_path / "whole", settings)
    train(tmp_path / "parts", settings, stop=2)
    parts = train(tmp_path / "parts", settings)
    assert parts.step == whole.step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    for name, value in whole.mean.items():
        assert torch.equal(value, parts.mean[name]), name
    assert len(parts.history) == 1


def test_changed_settings_are_recorded(tmp_path: Path) -> None:
    train(tmp_path, SMALL, stop=1)
    run = train(tmp_path, replace(SMALL, matrix_lr=0.001), stop=2)
    assert [stage["step"] for stage in run.history] == [0, 1]
    assert run.optimizers[1].param_groups[0]["initial_lr"] == 0.001
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert json.loads(state["history"]) == run.history
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_renewing_keeps_the_loss_and_drops_the_momentum(tmp_path: Path) -> None:
    from styleattn.tiny.renew import renew

    train(tmp_path, SMALL, stop=1)
    run = renew(tmp_path, SMALL, batches=1)
    assert run.history[-1] == {"step": 1, "renewed": "transformers"}
    again = Run(tmp_path, SMALL)
    norm = again.model.unet.mid_block.attentions[0].transformer_blocks[0].norm3
    assert torch.equal(
        norm.weight, again.mean["unet.mid_block.attentions.0.transformer_blocks.0.norm3.weight"]
    )
    assert norm not in again.optimizers[0].state


def test_batches_hold_groups_of_one_style(tmp_path: Path) -> None:
    tokenizer = new_tokenizer(tmp_path)
    batch = make_batch(Settings(batch=8, shared=1.0), 0, tokenizer)
    assert batch.groups == 2
    assert (batch.times[:4][1:] == batch.times[1]).all() and (
        batch.times[0] <= batch.times[1]
    ).all()
    alone = make_batch(Settings(batch=8), 0, tokenizer)
    assert alone.groups == 0 and len(set(alone.times.tolist())) == 8
    same = make_batch(Settings(batch=8), 0, tokenizer)
    assert torch.equal(alone.latents, same.latents) and torch.equal(alone.noise, same.noise)
    assert not torch.equal(alone.noise, make_batch(Settings(batch=8), 1, tokenizer).noise)


def test_latents_are_the_pixels() -> None:
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(pictures_of(latents_of(pictures)), pictures)


def test_the_rate_warms_up_and_cools_down_to_zero() -> None:
    settings = Settings(steps=1000, warmup=100, cooldown=0.4)
    assert rate(settings, 0) == pytest.approx(0.01)
    assert rate(settings, 300) == 1.0
    assert rate(settings, 800) == pytest.approx(0.5)
    assert rate(settings, 1000) == 0.0


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (8, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.max() < 1.4 and values.min() > 0.4
