"""The fused norms inside models: what the hosts give them, against the formulas."""

from __future__ import annotations

import pytest
import random_flux
import random_pipelines
import torch

from styleattn.kernels import norms
from styleattn.methods import AlignedGen, StyleAligned
from styleattn.processors import apply
from styleattn.processors._norms import rms_parameters

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the fused norms that ran."""
    names = []
    for name in ("rotary_forward", "group_norm_forward"):
        real = getattr(norms, name)
        monkeypatch.setattr(
            norms, name, lambda *a, real=real, name=name: names.append(name) or real(*a)
        )
    return names


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("method", [StyleAligned(), AlignedGen(layers="all")])
def test_flux(method, launched):
    pipe = random_flux.flux()
    calls = {"prompts": ["a cat", "a dog"], "steps": 1, "size": 8}
    with apply(pipe, method, backend="torch"):
        want = random_flux.run(pipe, **calls)
    assert not launched
    with apply(pipe, method, backend="triton"):
        got = random_flux.run(pipe, **calls)
    assert "rotary_forward" in launched
    assert relative(got, want) <= 1e-5


def test_shared_group_norm(launched):
    model = random_pipelines.unet(**SMALL)
    torch.manual_seed(0)
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 7, model.config.cross_attention_dim)
    norms_only = {"share_attention": False, "adain_queries": False, "adain_keys": False}
    method = StyleAligned(layers=("mid_block",), **norms_only)

    def call(backend):
        with apply(model, method, backend=backend) as handle, handle.layout(2), torch.no_grad():
            return model(x, 500, text).sample

    want = call("torch")
    assert not launched
    got = call("triton")  # only norms: no attention is changed
    assert set(launched) == {"group_norm_forward"}
    assert relative(got, want) <= 1e-5


def test_what_must_be_called_is_called():
    """Another module, hooks, a weight of another dtype: no parameters are read."""
    norm, x = torch.nn.RMSNorm(8, eps=1e-6), torch.ones(1, 2, 3, 8)
    weight, eps = rms_parameters(norm, x)
    assert weight is norm.weight and eps == 1e-6
    assert rms_parameters(norm, x.half()) is None and rms_parameters(norm, x.double()) is None
    assert rms_parameters(torch.nn.LayerNorm(8), x) is None
    assert rms_parameters(norm, x[..., :4]) is None
    with norm.register_forward_hook(lambda *a: None):
        assert rms_parameters(norm, x) is None
    norm.forward = lambda x: x
    assert rms_parameters(norm, x) is None
    assert rms_parameters(torch.nn.RMSNorm(8), x)[1] == torch.finfo(torch.float32).eps
