"""Whole FLUX transformers as Black Forest Labs, PuLID, XLabs and USO publish them, against our
methods on diffusers' of the same random weights.

Nothing is downloaded: each test wants a checkout of the official repository, named by an
environment variable (and einops), and is skipped without it.

    OFFICIAL_FLUX=... OFFICIAL_PULID=... OFFICIAL_X_FLUX=... OFFICIAL_USO=... \\
        OFFICIAL_OMINI_CONTROL=... \\
        python -m pytest tests/external/test_flux_models.py -s
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import checkpoints
import pytest
import random_flux
import torch
from flux_oracles import tokens_at
from peft import LoraConfig
from random_flux import TEXT, TOKENS, relative
from safetensors.torch import save_file
from torch import Tensor

from styleattn.adapters import load_flux_ip_adapter, load_pulid, load_uso
from styleattn.methods import (
    USO,
    FillDiptych,
    InContext,
    IPAdapter,
    OminiControl,
    PuLIDFLUX,
    Redux,
)
from styleattn.processors import apply
from styleattn.processors.flux import joint_attention_layers
from styleattn.references import Reference

GRID, HEADS = (3, 4), 2
PULID = {"face": 10, "vision": 12, "dim": 24, "queries": 6, "out": 20, "image": 32, "heads": 2}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@contextlib.contextmanager
def imported(variable: str, folder: str, *names: str) -> Iterator[list[Any]]:
    """Modules of a checkout; all of these repositories call their package `flux`."""
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no checkout")
    pytest.importorskip("einops")
    before = set(sys.modules)
    sys.path.insert(0, str(Path(root, folder)))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.pop(0)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("flux", "pulid", "eva_clip", "uso", "omini", "cv2"):
                del sys.modules[name]


def official(model: Any, module: Any) -> Any:
    """The authors' transformer with the weights of diffusers'."""
    config = model.config
    known = {
        "in_channels": config.in_channels,
        "out_channels": model.out_channels,
        "vec_in_dim": config.pooled_projection_dim,
        "context_in_dim": TEXT,
        "hidden_size": model.inner_dim,
        "mlp_ratio": 4.0,
        "num_heads": HEADS,
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "axes_dim": list(config.axes_dims_rope),
        "theta": 10_000,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    names = module.FluxParams.__dataclass_fields__
    made = module.Flux(module.FluxParams(**{n: x for n, x in known.items() if n in names})).eval()
    found = made.load_state_dict(renamed(model), strict=False)
    missing = [n for n in found.missing_keys if not n.startswith("feature_embedder.")]  # USO's
    assert not missing and not found.unexpected_keys
    return made


def renamed(model: Any) -> dict[str, Tensor]:
    """The weights of diffusers' transformer under the names that the authors print."""
    found: dict[str, Tensor] = {}

    def linear(name: str, *parts: Any) -> None:
        found[f"{name}.weight"] = torch.cat([p.weight for p in parts])
        found[f"{name}.bias"] = torch.cat([p.bias for p in parts])

    def norms(name: str, query: Any, key: Any) -> None:
        found[f"{name}.query_norm.scale"] = query.weight
        found[f"{name}.key_norm.scale"] = key.weight

    linear("img_in", model.x_embedder)
    linear("txt_in", model.context_embedder)
    told = model.time_text_embed
    for name, part in (
        ("time_in", told.timestep_embedder),
        ("guidance_in", told.guidance_embedder),
        ("vector_in", told.text_embedder),
    ):
        linear(f"{name}.in_layer", part.linear_1)
        linear(f"{name}.out_layer", part.linear_2)
    for i, block in enumerate(model.transformer_blocks):
        attn, stem = block.attn, f"double_blocks.{i}"
        linear(f"{stem}.img_mod.lin", block.norm1.linear)
        linear(f"{stem}.txt_mod.lin", block.norm1_context.linear)
        linear(f"{stem}.img_attn.qkv", attn.to_q, attn.to_k, attn.to_v)
        linear(f"{stem}.txt_attn.qkv", attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms(f"{stem}.img_attn.norm", attn.norm_q, attn.norm_k)
        norms(f"{stem}.txt_attn.norm", attn.norm_added_q, attn.norm_added_k)
        linear(f"{stem}.img_attn.proj", attn.to_out[0])
        linear(f"{stem}.txt_attn.proj", attn.to_add_out)
        for stream, mlp in (("img", block.ff), ("txt", block.ff_context)):
            linear(f"{stem}.{stream}_mlp.0", mlp.net[0].proj)
            linear(f"{stem}.{stream}_mlp.2", mlp.net[2])
    for i, block in enumerate(model.single_transformer_blocks):
        attn, stem = block.attn, f"single_blocks.{i}"
        linear(f"{stem}.modulation.lin", block.norm.linear)
        linear(f"{stem}.linear1", attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
        linear(f"{stem}.linear2", block.proj_out)
        norms(f"{stem}.norm", attn.norm_q, attn.norm_k)
    linear("final_layer.linear", model.proj_out)
    last = model.norm_out.linear
    for name, x in (("weight", last.weight), ("bias", last.bias)):  # scale and shift change places
        found[f"final_layer.adaLN_modulation.1.{name}"] = torch.cat(x.chunk(2)[::-1])
    return found


def theirs(model: Any, x: dict[str, Tensor], **more: Any) -> Tensor:
    """The authors' call."""
    batch = len(x["hidden_states"])
    return model(
        img=x["hidden_states"],
        img_ids=x["img_ids"].expand(batch, -1, -1),
        txt=x["encoder_hidden_states"],
        txt_ids=x["txt_ids"].expand(batch, -1, -1),
        timesteps=x["timestep"],
        y=x["pooled_projections"],
        guidance=x["guidance"],
        **more,
    )


def ours(model: Any, x: dict[str, Tensor], *methods: Any) -> Tensor:
    with apply(model, *methods) if methods else contextlib.nullcontext():
        out: Tensor = model(**x, return_dict=False)[0]
    return out


def close(name: str, a: Tensor, b: Tensor) -> None:
    error = relative(a, b)
    print(f"\n{name}: {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("fills", [False, True], ids=["dev", "fill"])
def test_redux_next_to_the_text(fills: bool) -> None:
    """Their sampler puts Redux' tokens behind T5's; FLUX.1 Fill with a canvas' tokens in another
    order."""
    model = random_flux.transformer(**({"in_channels": 20, "out_channels": 8} if fills else {}))
    x = random_flux.inputs(batch=2, grid=GRID)
    if fills:
        x["hidden_states"] = torch.randn(2, 12, 20)
    redux = Redux(references=(Reference(embeds=TOKENS),))
    panels = [FillDiptych(b_to_a=1 + 1e-12)] if fills else []
    with imported("OFFICIAL_FLUX", "src", "flux.model") as (module,):
        more = TOKENS.expand(2, -1, -1)
        ids = torch.zeros(x["txt_ids"].shape[0] + len(TOKENS), 3)
        text = torch.cat([x["encoder_hidden_states"], more], 1)
        told = {**x, "encoder_hidden_states": text, "txt_ids": ids}
        expected = theirs(official(model, module), told)
    close("BFL + Redux", ours(model, x, redux, *panels), expected)
    assert relative(ours(model, x), expected) > 1e-3


def test_pulid(tmp_path: Path) -> None:
    model = random_flux.transformer(num_layers=3, num_single_layers=5)
    tensors = checkpoints.noise(checkpoints.pulid(4, **PULID))
    save_file(tensors, tmp_path / "pulid.safetensors")
    adapter = load_pulid(tmp_path / "pulid.safetensors", double=3, single=5)
    x, person = random_flux.inputs(batch=2, grid=GRID), torch.randn(6, 20)
    names = ("flux.model", "pulid.encoders_transformer")
    with imported("OFFICIAL_PULID", "", *names) as (module, encoders):
        flux = official(model, module)
        parts = [encoders.PerceiverAttentionCA(dim=32, heads=2, kv_dim=20) for _ in range(4)]
        flux.pulid_ca = torch.nn.ModuleList(parts)
        known = {n.removeprefix("pulid_ca."): t for n, t in tensors.items() if "pulid_ca" in n}
        flux.pulid_ca.load_state_dict(known)
        expected = theirs(flux, x, id=person.expand(2, -1, -1), id_weight=0.8)
    method = PuLIDFLUX(adapter=adapter, references=(Reference(embeds=person),), id_weight=0.8)
    close("PuLID", ours(model, x, method), expected)
    assert relative(ours(model, x), expected) > 1e-3


def test_xlabs(tmp_path: Path) -> None:
    model = random_flux.transformer()
    tensors = checkpoints.noise(checkpoints.xlabs(2, 32, 32, 32, 4))
    save_file(tensors, tmp_path / "xlabs.safetensors")
    layers = [(name, 32, 32) for name in joint_attention_layers(model)]
    adapter = load_flux_ip_adapter(tmp_path / "xlabs.safetensors", layers, head_dim=16)
    x, seen = random_flux.inputs(batch=2, grid=GRID), torch.randn(32)
    with imported("OFFICIAL_X_FLUX", "src", "flux.model", "flux.modules.layers") as (
        module,
        parts,
    ):
        flux = official(model, module)
        projector = parts.ImageProjModel(32, 32, 4)
        own = "ip_adapter_proj_model."
        projector.load_state_dict(
            {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
        )
        for i, block in enumerate(flux.double_blocks):
            processor = parts.IPDoubleStreamBlockProcessor(32, 32)
            stem = f"double_blocks.{i}.processor."
            processor.load_state_dict(
                {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
            )
            block.set_processor(processor)
        tokens = projector(seen[None]).expand(2, -1, -1)
        expected = theirs(flux, x, image_proj=tokens, ip_scale=0.7)
    shown = (Reference(embeds=seen, negative=torch.zeros(32), weight=0.7),)
    close("XLabs", ours(model, x, IPAdapter(adapter=adapter, references=shown)), expected)
    assert relative(ours(model, x), expected) > 1e-3


def test_uso(tmp_path: Path) -> None:
    """Two style pictures before the text, a content picture behind the image, below and right."""
    model = random_flux.transformer()
    tensors = checkpoints.noise(checkpoints.uso(32, 16, 3, 32))
    save_file(tensors, tmp_path / "uso.safetensors")
    x = random_flux.inputs(batch=2, grid=GRID)
    levels = torch.randn(2, 3, 16, 32)
    latents = torch.randn(1, 4, 6)
    with imported("OFFICIAL_USO", "", "uso.flux.model", "uso.flux.modules.layers") as (
        module,
        parts,
    ):
        flux = official(model, module)
        embedder = parts.SigLIPMultiFeatProjModel(16, 3, 32, 32, context_layer_norm=True)
        own = "feature_embedder."
        embedder.load_state_dict({n.removeprefix(own): t for n, t in tensors.items()})
        flux.feature_embedder = embedder

        def tower(index: int, output_hidden_states: bool) -> Any:
            states = dict(zip((-2, -11, -20), levels[index : index + 1].unbind(1), strict=True))
            return SimpleNamespace(
                hidden_states={i: s.expand(2, -1, -1) for i, s in states.items()}
            )

        flux.vision_encoder = tower
        cells, ids = tokens_at(latents, (3, 4))
        pictures = [{"index": 0}, {"index": 1}]
        places = [ids.expand(2, -1, -1)]
        beside = {"ref_img": [cells.expand(2, -1, -1)], "ref_img_ids": places}
        expected = theirs(flux, x, siglip_inputs=pictures, **beside)
    adapter = load_uso(tmp_path / "uso.safetensors")
    style = USO(adapter=adapter, references=tuple(Reference(embeds=one) for one in levels))
    content = InContext(references=(Reference(latents=latents),), positions="diagonal")
    close("USO", ours(model, x, style, content), expected)
    assert relative(ours(model, x, content), expected) > 1e-3
    assert relative(ours(model, x, style), expected) > 1e-3


def test_omini_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two conditions, each at its place, under a LoRA that the image does not have."""
    model = random_flux.transformer()
    names = ["to_q", "to_k", "to_v", "to_out.0", "x_embedder", "norm.linear", "norm1.linear"]
    names += ["ff.net.2", "proj_mlp", *(f"single_transformer_blocks.{i}.proj_out" for i in (0, 1))]
    # their code takes every LoRA for one of scale 1
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=names)
    model.add_adapter(config, adapter_name="subject")
    x = random_flux.inputs(batch=1, grid=GRID)
    latents = [torch.randn(1, 4, 6), torch.randn(1, 6, 4)]
    monkeypatch.setitem(sys.modules, "cv2", ModuleType("cv2"))  # for pictures, not for the model
    with imported("OFFICIAL_OMINI_CONTROL", "", "omini.pipeline.flux_omini") as (module,):
        shown = [tokens_at(z, (2, -4)) for z in latents]
        told, one, none = x["timestep"], torch.ones(1), torch.zeros(1)
        mask = torch.ones(4, 4, dtype=torch.bool)
        mask[2:, 2:] = torch.eye(2, dtype=torch.bool)
        expected = module.transformer_forward(
            model,
            image_features=[x["hidden_states"], *(cells for cells, _ in shown)],
            text_features=[x["encoder_hidden_states"]],
            img_ids=[x["img_ids"], *(ids for _, ids in shown)],
            txt_ids=[x["txt_ids"]],
            pooled_projections=[x["pooled_projections"]] * 4,
            timesteps=[told, told, none, none],
            guidances=[x["guidance"], x["guidance"], one, one],
            adapters=[None, None, "subject", "subject"],
            group_mask=mask,
        )[0]
    references = tuple(Reference(latents=z) for z in latents)
    method = OminiControl(references=references, offset=(2, -4), lora="subject")
    close("OminiControl", ours(model, x, method), expected)
    assert relative(ours(model, x), expected) > 1e-3
