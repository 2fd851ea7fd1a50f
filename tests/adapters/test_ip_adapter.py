"""IP-Adapter files: the published layouts, against diffusers' own loader and projectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from random_pipelines import UNET, unet
from safetensors.torch import save_file
from torch import Tensor

from styleattn.adapters import checkpoint_order, ip_adapter_from, load_ip_adapter
from styleattn.errors import Invalid
from styleattn.inversion import FileRefused

CROSS, CLIP, HIDDEN = 32, 24, 40
KINDS = {
    "base": checkpoints.base(CLIP, CROSS),
    "plus": checkpoints.resampler(HIDDEN, 128, CROSS, 6, 2),
    "full-face": checkpoints.full_face(HIDDEN, CROSS),
}


@pytest.fixture(scope="module")
def host() -> Any:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    return unet(**{**UNET, **blocks, "cross_attention_dim": CROSS, "attention_head_dim": 2})


def layers_of(host: Any) -> list[tuple[str, int, int]]:
    return [
        (name, module.to_k.out_features, module.to_k.in_features)
        for name, module in host.named_modules()
        if name.endswith("attn2")
    ]


def file_of(host: Any, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """In the order in which diffusers counts its processors, which is not ours to choose."""
    modules = dict(host.named_modules())
    names = [n.removesuffix(".processor") for n in host.attn_processors]
    layers = [(n, modules[n].to_k.out_features, CROSS) for n in names if n.endswith("attn2")]
    return checkpoints.noise({**KINDS[kind], **checkpoints.pairs(layers)}, seed)


def embeds_for(kind: str, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (rows, CLIP) if kind == "base" else (rows, 9, HIDDEN)
    return torch.randn(*shape, generator=generator)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_keys_and_values_are_diffusers(host: Any, kind: str) -> None:
    sd = file_of(host, kind)
    ours = ip_adapter_from(sd, layers_of(host))
    theirs = unet(**dict(host.config))
    state = checkpoints.nested(sd, ("image_proj", "ip_adapter"))
    theirs._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    embeds = embeds_for(kind)
    with torch.no_grad():
        (expected,) = theirs.encoder_hid_proj([embeds[:, None]])
        close(ours.tokens(embeds), expected.flatten(1, 2))
        modules = dict(theirs.named_modules())
        assert set(ours.layers) == {name for name, _, _ in layers_of(host)}
        for name in ours.layers:
            processor = modules[name].processor
            key, value = ours.key_value(name, ours.tokens(embeds))
            close(key, processor.to_k_ip[0](expected.flatten(1, 2)))
            close(value, processor.to_v_ip[0](expected.flatten(1, 2)))


def test_two_adapters_give_what_diffusers_multi_projection_gives(host: Any) -> None:
    files = [file_of(host, kind, seed) for seed, kind in enumerate(KINDS)]
    theirs = unet(**dict(host.config))
    states = [checkpoints.nested(sd, ("image_proj", "ip_adapter")) for sd in files]
    theirs._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    embeds = [embeds_for(kind) for kind in KINDS]
    with torch.no_grad():
        expected = theirs.encoder_hid_proj([e[:, None] for e in embeds])
        for sd, e, tokens in zip(files, embeds, expected, strict=True):
            close(ip_adapter_from(sd, layers_of(host)).tokens(e), tokens.flatten(1, 2))


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_give_back_what_was_written(
    host: Any, kind: str, layout: str, tmp_path: Path
) -> None:
    sd = {name: x.half() for name, x in file_of(host, kind).items()}
    path = tmp_path / f"adapter.{layout}"
    if layout == "bin":
        torch.save(checkpoints.nested(sd, ("image_proj", "ip_adapter")), path)
    else:
        save_file(sd, path)
    adapter = load_ip_adapter(path, layers_of(host))
    order = checkpoint_order(layers_of(host))
    assert adapter.kind == kind
    for name, x in adapter.projector.state_dict().items():
        assert torch.equal(x, sd[f"image_proj.{name}"])
    for i, layer in enumerate(order):
        key, value = adapter.layers[layer.name]
        assert torch.equal(key.weight, sd[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"])
        assert torch.equal(value.weight, sd[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"])
    as_single = load_ip_adapter(path, layers_of(host), dtype=torch.float32)
    assert {p.dtype for p in as_single.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in as_single.parameters())


def test_the_order_of_the_layers_given_does_not_matter(host: Any) -> None:
    sd = file_of(host, "base")
    layers = [(f"{name}.processor", inner, cross) for name, inner, cross in layers_of(host)]
    a, b = ip_adapter_from(sd, layers), ip_adapter_from(sd, layers[::-1])
    tokens = a.tokens(embeds_for("base"))
    for name, _, _ in layers:
        assert torch.equal(a.key_value(name, tokens)[0], b.key_value(name, tokens)[0])


def test_indices_count_down_up_mid() -> None:
    """The order of registration, with numbers compared as numbers."""
    for family, last in (("sd15", 31), ("sdxl", 139)):
        expected = checkpoints.unet_layers(family)
        found = checkpoint_order(sorted(expected))
        assert [layer.name for layer in found] == [name for name, _, _ in expected]
        assert 2 * (len(found) - 1) + 1 == last
    style = [i for i, layer in enumerate(found) if "up_blocks.0.attentions.1." in layer.name]
    assert [2 * i + 1 for i in style] == list(range(69, 88, 2))


PUBLISHED = {
    # name: host, projector's part of the file, kind, tower, its parameters where known
    "ip-adapter_sd15": ("sd15", checkpoints.base(1024, 768), "base", "ViT-H/14", None),
    "ip-adapter_sd15_vit-G": ("sd15", checkpoints.base(1280, 768), "base", "ViT-bigG/14", None),
    "ip-adapter_sdxl": ("sdxl", checkpoints.base(1280, 2048), "base", "ViT-bigG/14", None),
    "ip-adapter_sdxl_vit-h": ("sdxl", checkpoints.base(1024, 2048), "base", "ViT-H/14", None),
    "ip-adapter-plus_sd15": (
        *("sd15", checkpoints.resampler(1280, 768, 768, 16, 12), "plus", "ViT-H/14", 29.9e6),
    ),
    "ip-adapter-plus_sdxl_vit-h": (
        *("sdxl", checkpoints.resampler(1280, 1280, 2048, 16, 20), "plus", "ViT-H/14", 83e6),
    ),
    "ip-adapter-full-face_sd15": (
        *("sd15", checkpoints.full_face(1280, 768), "full-face", "ViT-H/14", None),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_accepted_at_their_real_sizes(name: str) -> None:
    family, projector, kind, tower, parameters = PUBLISHED[name]
    layers = checkpoints.unet_layers(family)
    shapes = {**projector, **checkpoints.pairs(layers)}
    adapter = ip_adapter_from(checkpoints.noise(shapes, device="meta"), layers)
    assert (adapter.kind, adapter.encoder.tower) == (kind, f"CLIP {tower}")
    assert adapter.encoder.sequence == (kind != "base")
    assert adapter.encoder.layer == (None if kind == "base" else -2)
    rows = (2, adapter.encoder.width) if kind == "base" else (2, 257, adapter.encoder.width)
    tokens = adapter.tokens(torch.empty(rows, device="meta"))
    assert tokens.shape == (2, {"base": 4, "plus": 16, "full-face": 257}[kind], layers[0][2])
    if parameters:
        count = sum(p.numel() for p in adapter.projector.parameters())
        assert abs(count - parameters) < 0.01 * parameters


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_renamed_and_misshapen_files_are_refused(host: Any, kind: str) -> None:
    sd = file_of(host, kind)
    for name in sd:
        without = {k: v for k, v in sd.items() if k != name}
        with pytest.raises(FileRefused, match=f"missing 1: {name}$"):
            ip_adapter_from(without, layers_of(host))
        with pytest.raises(FileRefused, match=rf"\n    wrong 1: {name} is \[3, 7\], not \[.*$"):
            ip_adapter_from({**sd, name: torch.ones(3, 7)}, layers_of(host))
    renamed = {k.replace("to_k_ip", "to_k"): v for k, v in sd.items()}
    count = len(layers_of(host))
    with pytest.raises(FileRefused) as caught:
        ip_adapter_from(renamed, layers_of(host), source="x.bin")
    assert f"x.bin is not a {kind} IP-Adapter for {count} layers" in str(caught.value)
    assert f"missing {count}: ip_adapter.1.to_k_ip.weight" in str(caught.value)
    assert f"unexpected {count}: ip_adapter.1.to_k.weight" in str(caught.value)


def test_a_file_for_another_host_is_refused_whole() -> None:
    layers = checkpoints.unet_layers("sdxl")
    other = checkpoints.unet_layers("sd15")
    shapes = {**checkpoints.base(1280, 768), **checkpoints.pairs(other)}
    with pytest.raises(FileRefused) as caught:
        ip_adapter_from(checkpoints.noise(shapes, device="meta"), layers)
    message = str(caught.value)
    assert "for 70 layers that read 2048 channels" in message
    assert "missing 108:" in message
    assert "image_proj.proj.weight is [3072, 1280], not [8192, 1280]" in message


def test_face_id_files_are_named_as_such() -> None:
    layers = checkpoints.unet_layers("sd15")
    shapes = {"image_proj.proj.0.weight": (8, 4), "image_proj.proj.2.weight": (8, 8)}
    shapes["image_proj.norm.weight"] = (8,)
    with pytest.raises(FileRefused, match="FaceID"):
        ip_adapter_from(checkpoints.noise(shapes), layers)


def test_layers_that_are_not_a_unets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no layers of a UNet: transformer_blocks\.0\.attn of 1"):
        ip_adapter_from({}, [("transformer_blocks.0.attn", 8, 8)])
    with pytest.raises(ValueError, match=r"several widths: \[8, 9\]"):
        name = "mid_block.attentions.0.transformer_blocks.{}.attn2"
        ip_adapter_from({}, [(name.format(0), 8, 8), (name.format(1), 8, 9)])


def test_no_image_is_zeros_for_the_base_and_an_encoded_picture_for_the_others(host: Any) -> None:
    """The base's negative tokens are the projector's bias, and they are not zero."""
    base = ip_adapter_from(file_of(host, "base"), layers_of(host))
    negative = base.negative(embeds_for("base"))
    assert torch.equal(negative, torch.zeros(3, CLIP))
    assert base.tokens(negative).abs().min() > 0
    plus = ip_adapter_from(file_of(host, "plus"), layers_of(host))
    embeds = embeds_for("plus")
    with pytest.raises(Invalid, match=r"hidden_states\[-2\] of .* zero after the normalisation"):
        plus.negative(embeds)
    plus.blank = torch.randn(1, 9, HIDDEN)
    assert torch.equal(plus.negative(embeds), plus.blank.expand(3, -1, -1))
    plus.blank = torch.randn(8, HIDDEN)
    with pytest.raises(Invalid, match=r"adapter\.blank \[8, 40\]"):
        plus.negative(embeds)


def test_calls_without_meaning_are_refused(host: Any) -> None:
    adapter = ip_adapter_from(file_of(host, "base"), layers_of(host))
    with pytest.raises(Invalid, match=r"projected embedding of .* width 24\n.*\[3, 9, 40\]"):
        adapter.tokens(embeds_for("plus"))
    with pytest.raises(KeyError, match="no projections for attn9"):
        adapter.key_value("attn9", torch.ones(1, 4, CROSS))


def test_rows_are_independent_and_half_weights_stay_half(host: Any) -> None:
    adapter = ip_adapter_from(file_of(host, "plus"), layers_of(host))
    embeds = embeds_for("plus")
    together = adapter.tokens(embeds)
    for row in range(3):
        close(adapter.tokens(embeds[row : row + 1])[0], together[row])
    assert adapter.to(dtype=torch.bfloat16).tokens(embeds).dtype == torch.bfloat16
