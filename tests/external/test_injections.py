"""Attention-injection methods and ReNoise against their authors' own code.

Nothing is downloaded: each test wants a checkout of the official repository, named by an
environment variable, and is skipped without it.

    OFFICIAL_STYLE_ALIGNED=... OFFICIAL_STYLE_ID=... OFFICIAL_Z_STAR=... \\
        OFFICIAL_CROSS_IMAGE=... OFFICIAL_RENOISE=... \\
        python -m pytest tests/external/test_injections.py
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from styleattn.inversion import ReNoise, renoise
from styleattn.methods import CrossImageAttention, Rows, SelfCall, StyleAligned, StyleID, ZStar


def checkout(variable: str) -> Path:
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no checkout")
    return Path(root)


def module(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def stub(monkeypatch):
    """Modules that the official file imports and does not use here."""

    def put(name: str, **names: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)

    return put


def tensors(rows: int, tokens: int = 64, heads: int = 2, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (3, rows, heads, tokens, width)
    means = 2 * torch.randn(3, rows, heads, 1, width, generator=generator)
    return torch.randn(shape, generator=generator) + means


def ours(method: Any, qkv: torch.Tensor, references: int, chunks: int, weights: tuple = ()) -> Any:
    rows = Rows(chunks, qkv.shape[1] // chunks, tuple(range(references)), (chunks > 1, False))
    numbers = {name: getattr(method, name) for name in method.NUMBERS}
    weights = weights or (1.0,) * references
    call = SelfCall(*qkv, rows, weights, 1.0, numbers, (None,) * references)
    return method.self_attention(call)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


KNOBS = (
    {},
    {"adain_values": True, "shared_score_scale": 0.5},
    {"shared_score_shift": 0.693, "shared_score_scale": 1.3},
    {"adain_queries": False, "adain_keys": False},
    {"full_attention_share": True},
)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_style_aligned(knobs):
    path = checkout("OFFICIAL_STYLE_ALIGNED") / "sa_handler.py"
    pytest.importorskip("einops")
    from diffusers.models.attention_processor import Attention

    name = "official_style_aligned_handler"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    sys.modules[name] = official  # its dataclasses look themselves up
    spec.loader.exec_module(official)
    torch.manual_seed(0)
    layer = Attention(query_dim=32, heads=2, dim_head=16).eval()
    x = torch.randn(6, 64, 32) + 2 * torch.randn(6, 1, 32)
    with torch.no_grad():
        theirs = official.SharedAttentionProcessor(official.StyleAlignedArgs(**knobs))
        expected = theirs(layer, x)
        heads = [
            project(x).unflatten(-1, (2, 16)).transpose(1, 2)
            for project in (layer.to_q, layer.to_k, layer.to_v)
        ]
        out = ours(StyleAligned(**knobs), torch.stack(heads), 1, 2)
        error = relative(layer.to_out[0](out.transpose(1, 2).flatten(2)), expected)
    del sys.modules[name]
    print(f"relative error {error:.1e}")
    assert error <= 1e-5


def test_style_id(stub):
    root = checkout("OFFICIAL_STYLE_ID")
    pytest.importorskip("einops")
    for name in ("ldm", "ldm.modules", "ldm.modules.diffusionmodules"):
        stub(name)
    stub("ldm.modules.diffusionmodules.util", checkpoint=None)
    official = module(root / "ldm" / "modules" / "attention.py", "official_style_id")
    torch.manual_seed(0)
    layer = official.CrossAttention(query_dim=32, heads=2, dim_head=16).eval()
    x = torch.randn(3, 64, 32) + 2 * torch.randn(3, 1, 32)
    with torch.no_grad():
        heads = [
            layer_(x).unflatten(-1, (2, 16)).transpose(1, 2)
            for layer_ in (layer.to_q, layer.to_k, layer.to_v)
        ]
        q, k, v = heads
        expected = layer(
            x[2:],
            q_injected=q[0],
            k_injected=k[1],
            v_injected=v[1],
            injection_config={"T": 1.5, "gamma": 0.75},
        )
        out = ours(StyleID(), torch.stack(heads), 2, 1)[2:]
        error = relative(layer.to_out(out.transpose(1, 2).flatten(2)), expected)
    print(f"relative error {error:.1e}")  # with -s: for docs/parity.md
    assert error <= 1e-5


def test_z_star(stub, monkeypatch):
    root = checkout("OFFICIAL_Z_STAR")
    pytest.importorskip("einops")
    for name in ("torchvision", "torchvision.utils", "cv2"):
        stub(name, save_image=None)
    stub("zstar")
    sys.modules["zstar"].__path__ = [str(root / "zstar")]  # type: ignore[attr-defined]
    monkeypatch.syspath_prepend(str(root))
    for name in ("zstar.zstar", "zstar.zstar_utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    official = importlib.import_module("zstar.zstar")
    control = official.ReweightCrossAttentionControl(0, layer_idx=[0], total_steps=10)
    control.cur_step = control.cur_att_layer = 0
    qkv = tensors(4)  # [style, picture] without and with condition
    flat = [x.flatten(0, 1) for x in qkv]
    scores = flat[0] @ flat[1].mT / 4
    expected = control.forward(
        *flat, scores, scores.softmax(-1), False, "up", num_heads=2, scale=16**-0.5
    )
    out = ours(ZStar(), qkv, 1, 2).transpose(1, 2).flatten(2)
    error = relative(out, expected)
    print(f"relative error {error:.1e}")  # with -s: for docs/parity.md
    assert error <= 1e-5


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_cross_image_attention(stub, contrast):
    root = checkout("OFFICIAL_CROSS_IMAGE")
    constants = module(root / "constants.py", "official_constants")
    stub("constants", OUT_INDEX=constants.OUT_INDEX)
    official = module(root / "utils" / "attention_utils.py", "official_cross_image")
    q, k, v = tensors(3)  # [structure, appearance, picture]; theirs is [picture, app., structure]
    turned = [x[[2, 1, 0]].clone() for x in (q, k, v)]
    for x in turned[1:]:
        x[constants.OUT_INDEX] = x[constants.STYLE_INDEX]
    expected, _ = official.compute_scaled_dot_product_attention(
        *turned, edit_map=True, contrast_strength=contrast
    )
    method = CrossImageAttention(contrast=contrast)
    out = ours(method, torch.stack([q, k, v]), 2, 1, (0.0, 1.0))
    error = relative(out, expected[[2, 1, 0]])
    print(f"relative error {error:.1e}")  # with -s: for docs/parity.md
    assert error <= 1e-5


def test_renoise():
    root = checkout("OFFICIAL_RENOISE")
    official = module(root / "src" / "renoise_inversion.py", "official_renoise")
    generator = torch.Generator().manual_seed(0)
    noise, aim = torch.randn(2, 1, 4, 32, 32, generator=generator) + 0.3
    expected = official.noise_regularization(
        noise, aim, 0.065, 20.0, 4, 5, generator=torch.Generator().manual_seed(5)
    )
    found = renoise.regularised(noise, aim, ReNoise(), torch.Generator().manual_seed(5))
    error = relative(found, expected)
    print(f"relative error {error:.1e}")  # with -s: for docs/parity.md
    assert error <= 1e-5
