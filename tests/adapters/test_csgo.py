"""CSGO and StyleShot checkpoints, against the formulas and diffusers' resampler."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from styleattn.adapters import load_csgo, load_styleshot
from styleattn.inversion import FileRefused

CROSS, EMBED = 16, 24
BLOCKS = ("down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1", "mid_block")
LAYERS = [
    (f"{block}.attentions.{a}.transformer_blocks.0.attn2", width, CROSS)
    for block, count, width in zip(BLOCKS, (2, 2, 3, 3, 1), (8, 16, 16, 8, 16), strict=True)
    for a in range(count)
]
CONTROL = [layer for layer in LAYERS if not layer[0].startswith("up_blocks")]
PARTS = ("content_image_proj", "style_image_proj", "ip_adapter", "controlnet_adapter_modules")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return checkpoints.noise(checkpoints.csgo(LAYERS, EMBED, CROSS, (4, 8)))


def write(tensors: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "csgo.bin"
    torch.save(checkpoints.nested(tensors, PARTS), path)
    return path


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def resampler(tensors: dict[str, Tensor], prefix: str, embeds: Tensor) -> Tensor:
    """The formula of the Resampler, written out."""
    w = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["latents"].expand(embeds.shape[0], -1, -1)
    context = embeds @ w["proj_in.weight"].T + w["proj_in.bias"]
    for i in range(4):
        a, f = f"layers.{i}.0.", f"layers.{i}.1."
        inner = norm(x, f"{a}norm2")
        q = inner @ w[f"{a}to_q.weight"].T
        kv = torch.cat((norm(context, f"{a}norm1"), inner), 1) @ w[f"{a}to_kv.weight"].T
        k, v = kv.chunk(2, -1)
        out = torch.empty_like(q)
        for h in range(q.shape[-1] // 64):
            s = slice(64 * h, 64 * h + 64)
            p = (q[..., s] @ k[..., s].transpose(1, 2) / 8).softmax(-1)
            out[..., s] = p @ v[..., s]
        x = x + out @ w[f"{a}to_out.weight"].T
        x = x + F.gelu(norm(x, f"{f}0") @ w[f"{f}1.weight"].T) @ w[f"{f}3.weight"].T
    return norm(x @ w["proj_out.weight"].T + w["proj_out.bias"], "norm_out")


def test_projectors_and_layers_are_those_of_the_file(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    csgo = load_csgo(write(tensors, tmp_path), LAYERS, control_layers=CONTROL)
    embeds = torch.randn(2, 9, EMBED, generator=torch.Generator().manual_seed(1))
    assert csgo.control is not None
    for adapter, kind in (
        (csgo.content, "content"),
        (csgo.style, "style"),
        (csgo.control, "style"),
    ):
        close(adapter.tokens(embeds), resampler(tensors, f"{kind}_image_proj.", embeds))
    assert csgo.content.tokens(embeds).shape[1] == 4
    assert csgo.style.tokens(embeds).shape[1] == 8
    assert not csgo.content.layers  # the published wiring
    assert set(csgo.style.layers) == {n for n, _, _ in LAYERS if n.startswith("up_blocks")}
    assert set(csgo.control.layers) == {n for n, _, _ in LAYERS if n.startswith("down_blocks")}
    tokens = csgo.style.tokens(embeds)
    for i, (name, _, _) in enumerate(LAYERS):
        if name in csgo.style.layers:
            key, value = csgo.style.key_value(name, tokens)
            close(key, tokens @ tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"].T)
            close(value, tokens @ tensors[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"].T)
        if name in csgo.control.layers:
            place = f"controlnet_adapter_modules.{name}.processor.to_v_ip.weight"
            close(csgo.control.key_value(name, tokens)[1], tokens @ tensors[place].T)
    assert torch.equal(csgo.style.negative(embeds), torch.zeros_like(embeds))


def test_content_layers_are_given_where_the_file_has_them(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write(tensors, tmp_path)
    with pytest.raises(FileRefused) as caught:
        load_csgo(path, LAYERS, content_blocks=("down_blocks",))
    assert "with content at ['down_blocks']" in str(caught.value)
    assert "missing 8: ip_adapter.1.to_k_ip.weight" in str(caught.value)
    more = dict(tensors)
    for i, (name, inner, cross) in enumerate(LAYERS):
        for x in "kv":
            if name.startswith("down_blocks"):
                more[f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight"] = torch.randn(inner, cross)
            if name.startswith("up_blocks.1"):  # where both branches meet
                more[f"ip_adapter.{2 * i + 1}.to_{x}_ip_content.weight"] = torch.randn(inner, cross)
    save_file(more, tmp_path / "more.safetensors")
    both = ("down_blocks", "up_blocks.1")
    csgo = load_csgo(tmp_path / "more.safetensors", LAYERS, content_blocks=both)
    assert {n.split(".attentions")[0] for n in csgo.content.layers} == {
        *("down_blocks.1", "down_blocks.2", "up_blocks.1"),
    }
    index = next(i for i, x in enumerate(LAYERS) if x[0].startswith("up_blocks.1"))
    name = LAYERS[index][0]
    stem = f"ip_adapter.{2 * index + 1}."
    assert torch.equal(csgo.content.layers[name][0].weight, more[f"{stem}to_k_ip_content.weight"])
    assert torch.equal(csgo.style.layers[name][0].weight, more[f"{stem}to_k_ip.weight"])
    # the same file with the released wiring: what is not asked for is left alone
    assert not load_csgo(tmp_path / "more.safetensors", LAYERS).content.layers


def test_another_input_convolution_is_handed_over(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    weight = torch.randn(8, 4, 3, 3)
    nested = checkpoints.nested(tensors, PARTS)
    torch.save({**nested, "conv_in_unet_sd": {"weight": weight}}, tmp_path / "x.bin")
    csgo = load_csgo(tmp_path / "x.bin", LAYERS, dtype=torch.float16)
    assert torch.equal(csgo.conv_in["weight"], weight.half())
    assert {p.dtype for p in csgo.style.parameters()} == {torch.float16}


def test_truncated_renamed_and_misshapen_files_are_refused(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    bad = {k.replace("ip_adapter.9.", "ip_adapter.999."): v for k, v in tensors.items()}
    del bad["style_image_proj.latents"]
    bad["content_image_proj.layers.2.0.to_q.weight"] = torch.ones(3, 7)
    place = f"controlnet_adapter_modules.{LAYERS[0][0]}.processor.to_k_ip.weight"
    del bad[place]
    with pytest.raises(FileRefused) as caught:
        load_csgo(write(bad, tmp_path), LAYERS, control_layers=CONTROL)
    message = str(caught.value)
    for text in (
        "missing 4: ",
        "style_image_proj.latents",
        "ip_adapter.9.to_k_ip.weight",
        place,
        "unexpected 2: ip_adapter.999.to_k_ip.weight, ip_adapter.999.to_v_ip.weight",
        "wrong 1: content_image_proj.layers.2.0.to_q.weight is [3, 7], not [768, 16]",
    ):
        assert text in message


def test_styleshot_has_two_tokens_of_each_of_three_scales(tmp_path: Path) -> None:
    tensors = checkpoints.noise(checkpoints.styleshot(LAYERS, EMBED))
    extra = {"unet.conv_in.weight": torch.ones(2), "controlnet.x": torch.ones(1)}
    torch.save({**tensors, **extra}, tmp_path / "ip.bin")
    adapter = load_styleshot(tmp_path / "ip.bin", LAYERS)
    embeds = torch.randn(2, 3, EMBED)
    expected = []
    for i in range(3):
        w = {k.split(f".{i}.", 1)[1]: v for k, v in tensors.items() if f"modules.{i}." in k[:30]}
        x = embeds[:, i] @ w["proj.weight"].T + w["proj.bias"]
        x = x.reshape(2, 2, CROSS)
        expected.append(F.layer_norm(x, (CROSS,), w["norm.weight"], w["norm.bias"]))
    tokens = adapter.tokens(embeds)
    close(tokens, torch.cat(expected, 1))
    close(
        adapter.key_value(LAYERS[2][0], tokens)[0],
        tokens @ tensors["adapter_modules.5.to_k_ip.weight"].T,
    )
    del tensors["style_image_proj_modules.1.norm.bias"]
    torch.save({**tensors, "style_image_proj_modules.3.x": torch.ones(1)}, tmp_path / "bad.bin")
    with pytest.raises(FileRefused, match=r"missing 1: .*1\.norm\.bias\n.*unexpected 1: .*3\.x"):
        load_styleshot(tmp_path / "bad.bin", LAYERS)
