"""Image prompts in one cross-attention layer against their authors' own processors.

Nothing is downloaded: each test wants a checkout of the official repository, named by an
environment variable, and is skipped without it.

    OFFICIAL_IP_ADAPTER=... OFFICIAL_CSGO=... OFFICIAL_PULID=... OFFICIAL_DEADIFF=... \\
        OFFICIAL_RB_MODULATION=... \\
        python -m pytest tests/external/test_cross_attention.py -s
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from styleattn import attention
from styleattn.branch import Branch, Segment
from styleattn.methods import (
    CSGO,
    CrossCall,
    DEADiff,
    ImagePrompt,
    InstantStylePlus,
    IPAdapter,
    Layer,
    PuLIDSDXL,
    RBModulation,
    Rows,
)
from styleattn.references import Reference

ROWS, TOKENS, TEXT, WIDTH, CROSS, HEADS = 4, 63, 7, 32, 24, 2
SEEN = Reference(embeds=torch.ones(1))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def processors(variable: str, *parts: str, name: str = "attention_processor.py") -> Any:
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no checkout")
    path = Path(root, *parts, name)
    spec = importlib.util.spec_from_file_location(f"official_{variable.lower()}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer() -> tuple[Attention, Tensor, Tensor]:
    """A cross-attention layer, its input and its text, with strong means per channel."""
    attn = Attention(WIDTH, CROSS, heads=HEADS, dim_head=WIDTH // HEADS).eval()
    x = torch.randn(ROWS, TOKENS, WIDTH) + 2 * torch.randn(ROWS, 1, WIDTH)
    return attn, x, torch.randn(ROWS, TEXT, CROSS)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def prompt(index: int, key: Any, value: Any, tokens: Tensor) -> ImagePrompt:
    rows = torch.arange(ROWS)
    return ImagePrompt(split(key(tokens)), split(value(tokens)), rows, 1.0, None, index)


def ours(method: Any, attn: Any, x: Tensor, text: Tensor, *prompts: ImagePrompt) -> Tensor:
    query, key, value = (split(y) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text)))
    numbers = {name: getattr(method, name) for name in method.NUMBERS}
    place = Layer("up_blocks.0.attentions.1.transformer_blocks.0.attn2", 0, 1)
    rows = Rows(2, ROWS // 2, (), (True, False))
    call = CrossCall(place, query, key, value, None, prompts, rows, 1.0, numbers)
    parts = method.cross_parts(call)
    said = Branch((Segment(key, value), *parts.segments), weight=parts.text_weight)
    out = attention(query, (said, *parts.branches))
    if parts.after is not None:
        out = parts.after(out, tuple(attention(query, (b,)) for b in parts.apart))
    result: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
    return result


def close(ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).norm() / theirs.norm())
    print(f"relative error {error:.1e}")
    assert error <= 1e-5


def test_ip_adapter() -> None:
    official = processors("OFFICIAL_IP_ADAPTER", "ip_adapter")
    attn, x, text = layer()
    image = torch.randn(ROWS, 4, CROSS)
    theirs = official.IPAttnProcessor2_0(WIDTH, CROSS, scale=0.7, num_tokens=4)
    expected = theirs(attn, x, torch.cat([text, image], dim=1))
    seen = prompt(0, theirs.to_k_ip, theirs.to_v_ip, image)
    close(ours(IPAdapter(scale=0.7, adapter=1, references=SEEN), attn, x, text, seen), expected)


@pytest.mark.parametrize("kind", [CSGO, InstantStylePlus], ids=lambda kind: kind.name)
def test_content_and_style(kind: Any) -> None:
    """CSGO's layer with both branches; InstantStyle-Plus' two adapters compute the same."""
    official = processors("OFFICIAL_CSGO", "ip_adapter")
    attn, x, text = layer()
    content, style = torch.randn(ROWS, 4, CROSS), torch.randn(ROWS, 16, CROSS)
    theirs = official.IP_CS_AttnProcessor2_0(
        WIDTH, CROSS, style_scale=1.2, num_content_tokens=4, num_style_tokens=16, style=True
    )
    theirs.set_content_ipa(0.4)
    expected = theirs(attn, x, torch.cat([text, content, style], dim=1))
    prompts = (
        prompt(0, theirs.to_k_ip_content, theirs.to_v_ip_content, content),
        prompt(1, theirs.to_k_ip, theirs.to_v_ip, style),
    )
    method = kind(content_scale=0.4, style_scale=1.2, references=(SEEN, SEEN))
    close(ours(method, attn, x, text, *prompts), expected)


@pytest.mark.parametrize(("zeros", "ortho"), [(8, "v2"), (16, "v1"), (0, "")])
def test_pulid(zeros: int, ortho: str) -> None:
    official = processors("OFFICIAL_PULID", "pulid")
    official.NUM_ZERO, official.ORTHO = zeros, ortho == "v1"
    official.ORTHO_v2 = ortho == "v2"
    attn, x, text = layer()
    identity = torch.randn(ROWS, 5, CROSS)
    theirs = official.IDAttnProcessor2_0(WIDTH, CROSS)
    expected = theirs(attn, x, text, id_embedding=identity, id_scale=0.8)
    seen = prompt(0, theirs.id_to_k, theirs.id_to_v, identity)
    method = PuLIDSDXL(num_zero=zeros, ortho=ortho, references=SEEN)
    close(ours(method, attn, x, text, seen), expected)


@pytest.mark.parametrize("weight", [1.0, 0.6, 0.0])
def test_deadiff(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One softmax over text and image; its fused attention is PyTorch's here."""
    pytest.importorskip("einops")
    fused = types.ModuleType("xformers.ops")
    fused.memory_efficient_attention = lambda q, k, v, **_: (  # type: ignore[attr-defined]
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    )
    stubs = {name: types.ModuleType(name) for name in ("xformers", "ldm", "ldm.modules")}
    stubs["ldm.modules.diffusionmodules"] = types.ModuleType("ldm.modules.diffusionmodules")
    util = stubs["ldm.modules.diffusionmodules.util"] = types.ModuleType("util")
    util.checkpoint = None  # type: ignore[attr-defined]
    stubs["xformers"].ops = fused  # type: ignore[attr-defined]
    for name, module in {**stubs, "xformers.ops": fused}.items():
        monkeypatch.setitem(sys.modules, name, module)
    official = processors("OFFICIAL_DEADIFF", "ldm", "modules", name="new_attention.py")
    theirs = official.MemoryEfficientCrossAttention(WIDTH, CROSS, HEADS, WIDTH // HEADS).eval()
    _, x, text = layer()
    image = torch.randn(ROWS, 16, CROSS)
    image[: ROWS // 2] = 0  # what unconditional rows are told
    expected = theirs(x, (image, text), img_weight=weight)
    seen = prompt(0, theirs.i_to_k, theirs.i_to_v, image)
    method = DEADiff(img_weight=weight, references=SEEN)
    close(ours(method, theirs, x, text, seen), expected)


@pytest.mark.parametrize("content", [False, True], ids=["style", "content and style"])
def test_rb_modulation(content: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers have biases, and four tokens of a pooled text before those of the style, which the
    set of the style alone leaves out: here they are all there is of the text."""
    for name in ("CSD", "CSD.model", "CSD.utils", "modules", "modules.common", "train"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, *inside in (
        ("CSD.model", "CSD_CLIP"),
        ("CSD.utils", "convert_state_dict"),
        ("modules.common", "LayerNorm2d", "Linear"),
        ("train", "WurstCoreC"),
    ):
        for thing in inside:
            monkeypatch.setattr(
                sys.modules[name], thing, type("T", (), {"Models": 0, "Extras": 0}), raising=False
            )
    official = processors("OFFICIAL_RB_MODULATION", name="utils.py")
    theirs = official.Attention2D(WIDTH, HEADS).eval()
    theirs.attn.in_proj_bias.normal_()
    x = torch.randn(ROWS, TOKENS, WIDTH) + 2 * torch.randn(ROWS, 1, WIDTH)
    text = torch.randn(ROWS, TEXT if content else 4, WIDTH)
    picture, style = torch.randn(2, ROWS, 4, WIDTH)
    tokens = [text, picture, style] if content else [text, style]
    asked = {"img_style": True} if content else {"style": True}
    seen = torch.cat(tokens, dim=1).clone()  # it writes into what it is given
    expected = theirs(x.mT.unflatten(2, (9, 7)).contiguous(), seen, **asked)
    attn = types.SimpleNamespace(to_out=[theirs.attn.out_proj])
    into = zip(theirs.attn.in_proj_weight.chunk(3), theirs.attn.in_proj_bias.chunk(3), strict=True)
    for name, (weight, bias) in zip(("to_q", "to_k", "to_v"), into, strict=True):
        setattr(attn, name, functools.partial(torch.nn.functional.linear, weight=weight, bias=bias))
    prompts = [prompt(i, attn.to_k, attn.to_v, t) for i, t in enumerate(tokens[1:])]
    method = RBModulation(references=(SEEN,) * len(prompts))
    found = ours(method, attn, x, text, *prompts)  # type: ignore[arg-type]
    close(found, expected.flatten(2).mT)
