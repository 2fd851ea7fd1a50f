"""FLUX adapters: XLabs and Redux against diffusers, the others against their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from styleattn.adapters import (
    flux_order,
    load_flux_ip_adapter,
    load_redux,
    subtract_content,
)
from styleattn.adapters._adapter import clip
from styleattn.errors import Invalid
from styleattn.inversion import FileRefused

HEAD, INNER, TEXT = 16, 32, 24
LAYERS = [(f"transformer_blocks.{i}.attn", INNER, TEXT) for i in range(2)]
LAYERS += [(f"single_transformer_blocks.{i}.attn", INNER, TEXT) for i in range(11)]


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    bias = w.get(f"{name}.bias")
    return x @ w[f"{name}.weight"].T + (0 if bias is None else bias)


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=HEAD, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=8, in_channels=4, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


@torch.no_grad()
def test_xlabs_is_what_diffusers_loads(tmp_path: Path) -> None:
    from diffusers.loaders import FluxIPAdapterMixin

    tensors = checkpoints.noise(checkpoints.xlabs(2, 20, INNER, TEXT, 4))
    save_file(tensors, tmp_path / "x.safetensors")
    ours = load_flux_ip_adapter(tmp_path / "x.safetensors", LAYERS[::-1])

    class Pipe(FluxIPAdapterMixin):
        def __init__(self) -> None:
            self.transformer = transformer()

    pipe = Pipe()
    pipe.load_ip_adapter(str(tmp_path), "x.safetensors", low_cpu_mem_usage=False)
    embeds = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    (expected,) = pipe.transformer.encoder_hid_proj([embeds[:, None]])
    tokens = ours.tokens(embeds)
    close(tokens, expected.flatten(1, 2))
    assert ours.kind == "flux-xlabs"
    assert set(ours.layers) == {LAYERS[0][0], LAYERS[1][0]}  # double blocks only
    for i in range(2):
        processor = pipe.transformer.transformer_blocks[i].attn.processor
        key, value = ours.key_value(LAYERS[i][0], tokens)
        close(key, processor.to_k_ip[0](tokens))
        close(value, processor.to_v_ip[0](tokens))
    # the layout into which diffusers renames it
    renamed = {}
    for name, x in tensors.items():
        new = name.replace("ip_adapter_proj_model.", "image_proj.")
        new = new.replace("double_blocks.", "ip_adapter.").replace("processor.", "")
        renamed[new.replace("ip_adapter_double_stream_", "to_").replace("_proj.", "_ip.", 1)
                if "stream" in new else new] = x  # fmt: skip
    save_file(renamed, tmp_path / "y.safetensors")
    again = load_flux_ip_adapter(tmp_path / "y.safetensors", LAYERS)
    assert torch.equal(again.tokens(embeds), tokens)
    assert torch.equal(again.key_value(LAYERS[1][0], tokens)[1], value)


@pytest.mark.parametrize("tokens", [4, 16, 128])
def test_any_number_of_tokens_is_taken(tmp_path: Path, tokens: int) -> None:
    save_file(
        checkpoints.noise(checkpoints.xlabs(2, 20, INNER, TEXT, tokens)), tmp_path / "x.safetensors"
    )
    adapter = load_flux_ip_adapter(tmp_path / "x.safetensors", LAYERS)
    assert adapter.tokens(torch.randn(2, 20)).shape == (2, tokens, TEXT)
    with pytest.raises(Invalid, match=r"projected embedding of .* for a black picture"):
        adapter.negative(torch.randn(2, 20))
    adapter.blank = torch.randn(20)
    assert torch.equal(adapter.negative(torch.randn(2, 20))[1], adapter.blank)


def test_instantx_normalises_keys_and_values_per_head(tmp_path: Path) -> None:
    """Both are of unit mean square before the softmax."""
    tensors = checkpoints.noise(checkpoints.instantx(13, 20, INNER, TEXT, 7))
    torch.save(checkpoints.nested(tensors, ("image_proj", "ip_adapter")), tmp_path / "ip.bin")
    adapter = load_flux_ip_adapter(tmp_path / "ip.bin", LAYERS[::-1], head_dim=HEAD)
    embeds = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    w = {k.removeprefix("image_proj."): v for k, v in tensors.items()}
    hidden = F.gelu(linear(embeds, w, "proj.0"))
    expected = norm(linear(hidden, w, "proj.2").reshape(3, 7, TEXT), w, "norm")
    tokens = adapter.tokens(embeds)
    close(tokens, expected)
    assert (adapter.kind, len(adapter.layers)) == ("flux-instantx", 13)
    for i, (name, _, _) in enumerate(LAYERS):  # double blocks, then single, as numbers
        for x, ours in zip("kv", adapter.key_value(name, tokens), strict=True):
            y = (expected @ tensors[f"ip_adapter.{i}.to_{x}_ip.weight"].T).reshape(3, 7, 2, HEAD)
            close(ours, (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2))


@pytest.mark.parametrize("make", ["xlabs", "instantx"])
def test_bad_flux_files_are_refused(tmp_path: Path, make: str) -> None:
    blocks = {"xlabs": 2, "instantx": 13}[make]
    tensors = checkpoints.noise(getattr(checkpoints, make)(blocks, 20, INNER, TEXT, 4))
    path = tmp_path / "x.safetensors"
    for name in tensors:
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(FileRefused, match=f"flux-{make} .*\n    missing 1: {name}$"):
            load_flux_ip_adapter(path, LAYERS, head_dim=HEAD)
    save_file({**tensors, name: torch.ones(3, 7), "x": torch.ones(1)}, path)
    with pytest.raises(FileRefused, match=rf"unexpected 1: x\n.*wrong 1: {name} is \[3, 7\]"):
        load_flux_ip_adapter(path, LAYERS, head_dim=HEAD)
    with pytest.raises(ValueError, match=r"no layers of a FLUX transformer: down\.attn1 of 1"):
        flux_order([("down.attn1", 8, 8)])


def test_flux_layers_are_counted_double_then_single() -> None:
    layers = [(f"transformer_blocks.{i}.attn", 3072, 4096) for i in range(19)]
    layers += [(f"single_transformer_blocks.{i}.attn", 3072, 4096) for i in range(38)]
    assert [x.name for x in flux_order(sorted(layers))] == [name for name, _, _ in layers]


@torch.no_grad()
def test_redux_is_diffusers(tmp_path: Path) -> None:
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    theirs = ReduxImageEncoder(redux_dim=12, txt_in_features=8)
    state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    save_file(state, tmp_path / "redux.safetensors")
    redux = load_redux(tmp_path / "redux.safetensors")
    embeds = torch.randn(2, 9, 12)
    close(redux.tokens(embeds), theirs(embeds).image_embeds)
    assert redux.encoder.image_size == 384
    with pytest.raises(Invalid, match=r"last hidden state of SigLIP .* width 12"):
        redux.tokens(torch.randn(2, 12))
    for name in state:
        save_file({k: v for k, v in state.items() if k != name}, tmp_path / "bad.safetensors")
        with pytest.raises(FileRefused, match=f"not a Redux projector:\n    missing 1: {name}$"):
            load_redux(tmp_path / "bad.safetensors")


def test_content_is_subtracted_as_it_is() -> None:
    embeds, content = torch.randn(3, 8), torch.randn(8)
    close(subtract_content(embeds, content, scale=0.5), embeds - 0.5 * content)
    close(subtract_content(embeds, content[None]), embeds - content)
    each = torch.randn(3, 8)
    close(subtract_content(embeds, each, encoder=clip(8, "embeds", "zeros")), embeds - each)
    assert torch.equal(subtract_content(embeds, content, scale=0.0), embeds)
    with pytest.raises(Invalid) as caught:
        subtract_content(
            embeds, torch.randn(2, 8), scale=float("nan"), encoder=clip(9, "hidden", "grey")
        )
    assert len(caught.value.reasons) == 3
    with pytest.raises(Invalid, match="not hidden states"):
        subtract_content(torch.randn(3, 4, 8), content)
