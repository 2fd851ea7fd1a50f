"""DEADiff's checkpoint: Q-Formers against BLIP-2's, names against diffusers' LDM conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor

from styleattn.adapters import load_deadiff
from styleattn.adapters._ldm import diffusers_name
from styleattn.inversion import FileRefused

DIM, CONTEXT, QUERIES, INNER = 64, 24, 5, 96
LAYERS = [(name, width // 40, DIM) for name, width, _ in checkpoints.unet_layers("sd15")]


def ldm_unet(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """SD1.5's UNet under the names of the latent-diffusion code, from diffusers' names."""
    attention = {new: old for old, new in checkpoints.LDM_BLOCKS.items()}
    resnets = {f"down_blocks.{b}.resnets.{r}": f"input_blocks.{1 + 3 * b + r}.0"
               for b in range(4) for r in range(2)}  # fmt: skip
    resnets |= {f"up_blocks.{b}.resnets.{r}": f"output_blocks.{3 * b + r}.0"
                for b in range(4) for r in range(3)}  # fmt: skip
    resnets |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    samplers = {f"down_blocks.{b}.downsamplers.0.conv": f"input_blocks.{3 + 3 * b}.0.op"
                for b in range(3)}  # fmt: skip
    samplers |= {"up_blocks.0.upsamplers.0": "output_blocks.2.1"}
    samplers |= {f"up_blocks.{b}.upsamplers.0": f"output_blocks.{3 * b + 2}.2" for b in (1, 2)}
    ends = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    ends |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    leaves = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    leaves |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    found = {}
    for name, shape in shapes.items():
        for stem, new in {**attention, **resnets, **samplers, **ends}.items():
            if name.startswith(f"{stem}."):
                leaf = name.removeprefix(f"{stem}.")
                if stem in resnets:
                    first, _, rest = leaf.partition(".")
                    leaf = f"{leaves[first]}.{rest}"
                found[f"{new}.{leaf}"] = shape
    return found


@pytest.fixture(scope="module")
def sd15() -> dict[str, tuple[int, ...]]:
    """Names of SD1.5's UNet in diffusers, its widths divided by 40."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 32, 32), norm_num_groups=4, cross_attention_dim=DIM
        )
    return {k: tuple(v.shape) for k, v in unet.state_dict().items()}


@pytest.fixture(scope="module")
def tensors(sd15: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A whole checkpoint, as its training code writes it."""
    shapes = checkpoints.deadiff(DIM, CONTEXT, QUERIES, INNER)
    shapes |= {f"model.diffusion_model.{k}": v for k, v in ldm_unet(sd15).items()}
    for name in list(shapes):
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            shapes[name.replace("attn2.to_", "attn2.i_to_")] = shapes[name]
    return checkpoints.noise(shapes)


def write(tensors: dict[str, Tensor], folder: Path) -> Path:
    positions = {"style_blip.Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({"state_dict": {**tensors, **positions}, "global_step": 7}, folder / "x.ckpt")
    return folder / "x.ckpt"


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def qformer(tensors: dict[str, Tensor], kind: str, image: Tensor, word: list[int]) -> Tensor:
    """BLIP-2's Q-Former of transformers (diffusers' copy does not run on transformers 5), and
    diffusers' embeddings and projector."""
    try:
        from diffusers.pipelines.deprecated.blip_diffusion import modeling_blip2
    except ImportError:  # its place before diffusers 0.37
        from diffusers.pipelines.blip_diffusion import modeling_blip2
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder

    config = Blip2QFormerConfig(
        vocab_size=30523, hidden_size=DIM, num_hidden_layers=12, num_attention_heads=DIM // 64,
        intermediate_size=INNER, cross_attention_frequency=1, encoder_hidden_size=CONTEXT,
        use_qformer_text_input=True, attn_implementation="eager",
    )  # fmt: skip
    config.chunk_size_feed_forward = 0
    parts: list[Any] = [
        modeling_blip2.Blip2TextEmbeddings(config).eval(),
        Blip2QFormerEncoder(config).eval(),
        modeling_blip2.ProjLayer(DIM, DIM, INNER).eval(),
    ]
    stems = ["embeddings.", "encoder.", ""]
    for part, stem in zip(parts[:2], stems, strict=False):
        prefix = f"{kind}_blip.Qformer.bert.{stem}"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        own = {k.replace(".self.", ".attention."): v for k, v in own.items()}
        missing, unexpected = part.load_state_dict(own, strict=False)
        assert set(missing) <= {"position_ids"}
        assert not unexpected
    prefix = f"{kind}_proj_layer."
    parts[2].load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    norm = torch.nn.functional.layer_norm(
        image, (CONTEXT,), *(tensors[f"{kind}_blip.ln_vision.{x}"] for x in ("weight", "bias"))
    )
    ids = torch.tensor([word]).expand(image.shape[0], -1)
    x = parts[0](input_ids=ids, query_embeds=tensors[f"{kind}_blip.query_tokens"])
    out = parts[1](
        x,
        encoder_hidden_states=norm,
        query_length=QUERIES,
    )
    return parts[2](out.last_hidden_state[:, :QUERIES])


@torch.no_grad()
def test_tokens_are_those_of_blip_2(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    deadiff = load_deadiff(write(tensors, tmp_path), LAYERS)
    image = torch.randn(3, 9, CONTEXT, generator=torch.Generator().manual_seed(1))
    words = {"style": [101, 2806, 102], "content": [101, 4180, 102]}
    for kind, word in words.items():
        expected = qformer(tensors, kind, image, word)
        close(getattr(deadiff, kind).tokens(image), expected)
    other = qformer(tensors, "style", image, words["content"])
    assert (other - deadiff.style.tokens(image)).norm() > 1e-3 * other.norm()  # the word matters


def test_every_layer_belongs_to_style_or_content(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    deadiff = load_deadiff(write(tensors, tmp_path), LAYERS)
    content = [f"down_blocks.2.attentions.{a}" for a in (0, 1)] + ["mid_block.attentions.0"]
    content += [f"up_blocks.1.attentions.{a}" for a in (0, 1)]
    stems = {name.split(".transformer_blocks")[0] for name in deadiff.content.layers}
    assert stems == set(content)
    assert len(deadiff.style.layers) == 11
    assert not set(deadiff.style.layers) & set(deadiff.content.layers)
    tokens = torch.randn(2, QUERIES, DIM)
    for ldm, stem in checkpoints.LDM_BLOCKS.items():
        adapter = deadiff.content if stem in content else deadiff.style
        found = adapter.key_value(f"{stem}.transformer_blocks.0.attn2", tokens)
        for x, ours in zip("kv", found, strict=True):
            place = f"model.diffusion_model.{ldm}.transformer_blocks.0.attn2.i_to_{x}.weight"
            close(ours, tokens @ tensors[place].T)


def test_no_image_is_null_keys(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Unconditional rows see keys and values of zero, which still dilute."""
    style = load_deadiff(write(tensors, tmp_path), LAYERS).style
    image = torch.randn(1, 9, CONTEXT)
    tokens = style.tokens(torch.cat([style.negative(image), image]))
    assert not tokens[0].any()
    assert tokens[1].abs().min() > 0
    key, value = style.key_value(next(iter(style.layers)), tokens)
    assert not key[0].any()
    assert not value[0].any()


def test_names_are_those_of_diffusers_conversion(sd15: dict[str, tuple[int, ...]]) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ldm = ldm_unet(sd15)
    assert len(ldm) == len(sd15)
    assert {diffusers_name(name): shape for name, shape in ldm.items()} == sd15
    marked = {
        f"model.diffusion_model.{name}": torch.full((1,), float(i)) for i, name in enumerate(ldm)
    }
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    theirs = convert_ldm_unet_checkpoint(marked, config)
    ours = {diffusers_name(name): float(i) for i, name in enumerate(ldm)}
    assert {name: float(x) for name, x in theirs.items()} == ours


def test_the_unet_comes_along_and_fits(
    tensors: dict[str, Tensor], sd15: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    deadiff = load_deadiff(write(tensors, tmp_path), LAYERS, unet=sd15, dtype=torch.float16)
    assert {k: tuple(v.shape) for k, v in deadiff.unet.items()} == sd15
    assert torch.equal(
        deadiff.unet["up_blocks.1.attentions.2.proj_in.weight"],
        tensors["model.diffusion_model.output_blocks.5.1.proj_in.weight"].half(),
    )
    assert {p.dtype for p in deadiff.style.parameters()} == {torch.float16}


def test_truncated_renamed_and_misshapen_files_are_refused(
    tensors: dict[str, Tensor], sd15: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    bad = dict(tensors)
    stem = "style_blip.Qformer.bert.encoder.layer.11."
    bad[f"{stem}attention.self.q.weight"] = bad.pop(f"{stem}attention.self.query.weight")
    bad["content_proj_layer.dense2.bias"] = torch.ones(3)
    del bad["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.i_to_v.weight"]
    del bad["model.diffusion_model.input_blocks.3.0.op.weight"]
    with pytest.raises(FileRefused) as caught:
        load_deadiff(write(bad, tmp_path), LAYERS, unet=sd15)
    message = str(caught.value)
    for text in (
        "is not a DEADiff checkpoint for 16 layers",
        "missing 3: ",
        f"{stem}attention.self.query.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.i_to_v.weight",
        "unet.down_blocks.0.downsamplers.0.conv.weight",
        f"unexpected 1: {stem}attention.self.q.weight",
        "wrong 1: content_proj_layer.dense2.bias is [3], not [64]",
    ):
        assert text in message
