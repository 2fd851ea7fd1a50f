"""PuLID on FLUX and on SDXL, against the formulas."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from styleattn.adapters import load_pulid, load_pulid_sdxl
from styleattn.errors import Invalid
from styleattn.inversion import FileRefused


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    bias = w.get(f"{name}.bias")
    return x @ w[f"{name}.weight"].T + (0 if bias is None else bias)


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


FACE, VISION, DIM, QUERIES, OUT, IMAGE = 10, 12, 24, 6, 20, 28
PULID = checkpoints.pulid(4, FACE, VISION, DIM, QUERIES, OUT, IMAGE, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    p = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(-2)


def mapping(x: Tensor, w: dict[str, Tensor], stem: str) -> Tensor:
    for i in (0, 3):
        x = F.leaky_relu(norm(linear(x, w, f"{stem}.{i}"), w, f"{stem}.{i + 1}"), 0.01)
    return linear(x, w, f"{stem}.6")


def identity(
    tensors: dict[str, Tensor], face: Tensor, vision: list[Tensor], prefix: str = "pulid_encoder."
) -> Tensor:
    """IDFormer written out: the identity's own tokens join both the context and the latents."""
    w = {k.removeprefix(prefix): v for k, v in tensors.items()}
    own = mapping(face, w, "id_embedding_mapping").reshape(len(face), -1, DIM)
    x = torch.cat((w["latents"].expand(len(face), -1, -1), own), 1)
    for i in range(10):
        a, f = f"layers.{i}.0", f"layers.{i}.1"
        context = torch.cat((own, mapping(vision[i // 2], w, f"mapping_{i // 2}")), 1)
        inner = norm(x, w, f"{a}.norm2")
        both = torch.cat((norm(context, w, f"{a}.norm1"), inner), 1)
        k, v = linear(both, w, f"{a}.to_kv").chunk(2, -1)
        x = x + linear(attend(linear(inner, w, f"{a}.to_q"), k, v, 2), w, f"{a}.to_out")
        x = x + linear(F.gelu(linear(norm(x, w, f"{f}.0"), w, f"{f}.1")), w, f"{f}.3")
    return x[:, :QUERIES] @ w["proj_out"]


@torch.no_grad()
def test_pulid_is_the_formula(tmp_path: Path) -> None:
    tensors = checkpoints.noise(PULID)
    save_file(tensors, tmp_path / "pulid.safetensors")
    pulid = load_pulid(tmp_path / "pulid.safetensors", double=3, single=5)
    face, vision = torch.randn(2, FACE), [torch.randn(2, 7, VISION) for _ in range(5)]
    tokens = pulid.tokens(face, vision)
    close(tokens, identity(tensors, face, vision))
    zero = pulid.tokens(*pulid.negative(face, vision))
    assert zero.abs().min() > 0  # no identity is not zero
    close(zero, identity(tensors, face * 0, [v * 0 for v in vision]))
    nothing = torch.zeros(1, FACE), [torch.zeros(1, 577, VISION)] * 5
    close(pulid.nobody(), identity(tensors, *nothing))
    assert pulid.places(3, 5) == {
        **{"transformer_blocks.0": 0, "transformer_blocks.2": 1},
        **{"single_transformer_blocks.0": 2, "single_transformer_blocks.4": 3},
    }
    image = torch.randn(2, 9, IMAGE)
    for i in range(4):
        w = {k.removeprefix(f"pulid_ca.{i}."): v for k, v in tensors.items()}
        k, v = linear(norm(tokens, w, "norm1"), w, "to_kv").chunk(2, -1)
        q = linear(norm(image, w, "norm2"), w, "to_q")
        expected = linear(attend(q, k, v, 2), w, "to_out")
        close(pulid.pulid_ca[i](tokens, image), expected)
        part = pulid.attention(i)
        out = F.scaled_dot_product_attention(part.query(image), *part.key_value(tokens))
        close(part.out(out), expected)


def test_bad_pulid_files_and_faces_are_refused(tmp_path: Path) -> None:
    tensors = checkpoints.noise(PULID)
    path = tmp_path / "pulid.safetensors"
    for name in list(tensors)[::29]:
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(FileRefused, match=f"3 double and 5 single .*\n    missing 1: {name}$"):
            load_pulid(path, double=3, single=5)
        save_file({**tensors, name: torch.ones(3, 7)}, path)
        with pytest.raises(FileRefused, match=rf"blocks:\n    wrong 1: {name} is \[3, 7\], not"):
            load_pulid(path, double=3, single=5)
    save_file(tensors, path)
    with pytest.raises(FileRefused, match=r"missing 112: pulid_ca\.4\.norm1\.weight"):
        load_pulid(path)
    pulid = load_pulid(path, double=3, single=5, dtype=torch.bfloat16)
    assert {p.dtype for p in pulid.parameters()} == {torch.bfloat16}
    with pytest.raises(Invalid) as caught:
        pulid.tokens(torch.randn(2, 9), [torch.randn(2, 7, VISION)] * 4)
    assert caught.value.reasons == (
        "face must be [R, 10], or [R, F, 10] of F pictures",
        "vision must be 5 tensors [R, S, 12], R as in face",
    )
    with pytest.raises(ValueError, match="want 20 cross-attentions; there are 4"):
        pulid.places()


LAYERS = [(f"{block}.attentions.0.transformer_blocks.0.attn2", 16, OUT)
          for block in ("down_blocks.1", "up_blocks.0", "mid_block")]  # fmt: skip


@torch.no_grad()
def test_version_1_1_for_sdxl_takes_several_pictures_of_a_face(tmp_path: Path) -> None:
    shapes = checkpoints.idformer(FACE, VISION, DIM, QUERIES, OUT, 2, "id_adapter.")
    tensors = checkpoints.noise({**shapes, **checkpoints.pulid_pairs(LAYERS)})
    save_file(tensors, tmp_path / "pulid.safetensors")
    adapter = load_pulid_sdxl(tmp_path / "pulid.safetensors", LAYERS[::-1])
    for pictures in (1, 3):
        face = torch.randn(2, pictures, FACE)
        vision = [torch.randn(2, 7 * pictures, VISION) for _ in range(5)]
        tokens = adapter.identity(face, vision)
        close(tokens, identity(tensors, face, vision, "id_adapter."))
    assert torch.equal(adapter.tokens(tokens), tokens)
    for i, (name, _, _) in enumerate(LAYERS):
        key, value = adapter.key_value(name, tokens)
        stem = f"id_adapter_attn_layers.{2 * i + 1}."
        close(key, tokens @ tensors[f"{stem}id_to_k.weight"].T)
        close(value, tokens @ tensors[f"{stem}id_to_v.weight"].T)
    nobody = identity(
        tensors, torch.zeros(1, FACE), [torch.zeros(1, 577, VISION)] * 5, "id_adapter."
    )
    close(adapter.negative(tokens), nobody.expand(2, -1, -1))  # not zero


@torch.no_grad()
def test_version_1_for_sdxl_has_a_token_of_each_level(tmp_path: Path) -> None:
    shapes = checkpoints.pulid_v1(FACE, VISION, 14, OUT)
    tensors = checkpoints.noise({**shapes, **checkpoints.pulid_pairs(LAYERS)})
    torch.save(tensors, tmp_path / "pulid_v1.bin")
    adapter = load_pulid_sdxl(tmp_path / "pulid_v1.bin", LAYERS)
    face, vision = torch.randn(2, FACE), [torch.randn(2, 7, VISION) for _ in range(5)]
    w = {k.removeprefix("id_adapter."): v for k, v in tensors.items()}
    expected = [mapping(face, w, "body").reshape(2, 5, OUT)]
    for i, v in enumerate(vision):
        patches = mapping(v[:, 1:], w, f"mapping_patch_{i}").mean(1)
        expected.append((mapping(v[:, 0], w, f"mapping_{i}") + patches)[:, None])
    close(adapter.identity(face, vision), torch.cat(expected, 1))
    for name in list(tensors)[::17]:
        bad = {k: v for k, v in tensors.items() if k != name}
        torch.save(bad, tmp_path / "bad.bin")
        with pytest.raises(FileRefused, match=f"PuLID v1 .* 3 layers .*\n    missing 1: {name}$"):
            load_pulid_sdxl(tmp_path / "bad.bin", LAYERS)
        torch.save({**tensors, name: torch.ones(3, 7)}, tmp_path / "bad.bin")
        with pytest.raises(FileRefused, match=rf"SDXL:\n    wrong 1: {name} is \[3, 7\], not"):
            load_pulid_sdxl(tmp_path / "bad.bin", LAYERS)
