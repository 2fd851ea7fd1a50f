"""Token statistics against fp64, on poisoned memory."""

from __future__ import annotations

import math

import pytest
import torch

import styleattn
from styleattn.kernels import launch
from styleattn.kernels.stats import RUN, adain_forward, stats_launches, token_stats_forward
from styleattn.statistics import adain_to_rows
from styleattn.testing import features

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter
EPS = 1e-5


def expected(x):
    """Mean and sqrt(unbiased variance + eps) in fp64."""
    x = x.double()
    square = (x - x.mean(2, keepdim=True)).square().sum(2)
    return x.mean(2), (square / max(x.shape[2] - 1, 1) + EPS).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "dim"), [(1, 8), (63, 40), (65, 64), (RUN + 70, 80), (2, 160)])
def test_statistics(length, dim, dtype):
    x = features(torch.Generator().manual_seed(length), (2, 1, length, dim), dtype, strided=True)
    mean, std = token_stats_forward(x, EPS)
    assert mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape == (2, 1, dim)
    want_mean, want_std = expected(x)
    assert (mean - want_mean).abs().max() <= 1e-6 * want_mean.abs().max()
    assert ((std - want_std) / want_std).abs().max() <= 2e-6


def test_mean_far_above_deviation():
    x = 1e4 + torch.randn(1, 1, RUN + 130, 16, generator=torch.Generator().manual_seed(0))
    _, std = token_stats_forward(x, EPS)
    assert ((std - expected(x)[1]) / expected(x)[1]).abs().max() <= 1e-5


def test_half_precision_does_not_overflow():
    x = torch.full((1, 1, 130, 16), 6e4, dtype=torch.float16)
    x[:, :, ::2] = -6e4
    mean, std = token_stats_forward(x, EPS)
    assert torch.equal(mean, torch.zeros_like(mean))
    assert ((std - expected(x)[1]) / expected(x)[1]).abs().max() <= 1e-6


def test_any_strides():
    x = torch.randn(16, 33, 2, 3, generator=torch.Generator().manual_seed(0)).permute(3, 2, 1, 0)
    mean, std = token_stats_forward(x, EPS)
    dense = token_stats_forward(x.contiguous(), EPS)
    assert torch.equal(mean, dense[0]) and torch.equal(std, dense[1])


def test_constant_and_nan_channels():
    x = torch.full((1, 1, 70, 16), 3.25)
    x[..., 5, 2] = math.nan
    mean, std = token_stats_forward(x, EPS)
    bad = torch.arange(16) == 2
    assert mean[..., bad].isnan().all() and std[..., bad].isnan().all()
    assert (mean[..., ~bad] == 3.25).all()
    assert torch.allclose(std[..., ~bad], torch.tensor(math.sqrt(EPS)))


def test_one_launch_for_one_run():
    x = torch.zeros(1, 1, RUN, 16)
    out = torch.empty(1, 1, 16)
    assert len(stats_launches(x, EPS, out, out)) == 1
    assert len(stats_launches(x.repeat(1, 1, 2, 1), EPS, out, out)) == 2


def test_refusals_and_empty_batches():
    with pytest.raises(ValueError, match="float64"):
        token_stats_forward(torch.zeros(1, 1, 4, 8, dtype=torch.float64), EPS)
    mean, std = token_stats_forward(torch.zeros(0, 2, 4, 8), EPS)
    assert mean.shape == std.shape == (0, 2, 8)


@pytest.mark.parametrize(("length", "dim"), [(1, 8), (63, 40), (RUN + 70, 16)])
def test_adain_in_two_launches(length, dim):
    """The maps that the composition of operators gives; the identity, exactly, for references."""
    x = features(torch.Generator().manual_seed(length), (4, 2, length, dim), torch.bfloat16)
    rows = torch.tensor([0, 0, -1, 0])
    scale, shift, center, aim = adain_forward(x, rows, EPS)
    affine, mean = adain_to_rows(x, rows, eps=EPS, backend="reference")
    for got, want in ((scale, affine.scale), (shift, affine.shift), (center, affine.center)):
        assert (got - want).abs().max() <= 2e-6 * max(1, want.abs().max())
    assert (aim - mean).abs().max() <= 2e-6 * mean.abs().max()
    assert (scale[::2] == 1).all() and (shift[::2] == 0).all()


def test_shared_attention_finds_its_maps_in_two_launches_a_tensor(monkeypatch):
    started = []
    run = launch.Launch.run
    monkeypatch.setattr(
        launch.Launch, "run", lambda self, on: started.append(self) or run(self, on)
    )
    g = torch.Generator().manual_seed(0)
    q, k, v = (features(g, (2, 1, 70, 16), torch.bfloat16) for _ in range(3))
    styleattn.shared_attention(q, k, v, reference_rows=[0, 0], backend="triton")
    names = [x.kernel.fn.__name__ for x in started]
    maps = ["stats_kernel", "adain_kernel"]
    assert names == [*maps, *maps, "attention_kernel", "reach_kernel"]
    watched = styleattn.shared_attention(
        q.clone().requires_grad_(), k, v, reference_rows=[0, 0], backend="triton"
    )
    assert watched.requires_grad
