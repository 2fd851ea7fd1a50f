"""StyleID with kept features: what the rows of the batch give, without the rows."""

from __future__ import annotations

import pytest
import random_pipelines as tiny
import torch

from styleattn.inversion import FileRefused
from styleattn.methods import StyleAligned, StyleID
from styleattn.processors import apply
from styleattn.processors.bank import build_bank
from styleattn.processors.features import FeatureCache, cache_features
from styleattn.references import Reference

STEPS = 3


def references():
    g = torch.Generator().manual_seed(2)
    return [Reference(latents=0.8 * torch.randn(4, 16, 16, generator=g)) for _ in range(2)]


@pytest.fixture(scope="module")
def bank(sdxl):
    return build_bank(
        sdxl,
        references(),
        StyleID(),
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        labels="consistent",
        negative_prompt="blurred",
    )


def draw(pipe, prompts=("",), guidance=1.0, steps=STEPS):
    g = torch.Generator().manual_seed(5)
    return pipe(
        list(prompts),
        latents=torch.randn(len(prompts), 4, 16, 16, generator=g),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    ).images


def alike(found, expected):
    return float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("prompts", "guidance"), [(("",), 1.0), (("a cat", "a dog"), 1.0), (("a cat", "a dog"), 4.0)]
)
def test_it_is_what_the_rows_give(sdxl, bank, prompts, guidance):
    """One picture or several, with and without guidance; the rows are not there."""
    method = StyleID(gamma=0.6)
    plain = draw(sdxl, prompts, guidance)
    cache = cache_features(sdxl, method, bank, guided=guidance > 1)
    rows = []
    count = sdxl.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(args[0].shape[0]), with_kwargs=True, prepend=True
    )
    with apply(sdxl, method, bank=bank):
        expected = draw(sdxl, prompts, guidance)
    seen = []
    conv = sdxl.unet.conv_in.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[0])
    )
    with apply(sdxl, method, bank=cache):
        found = draw(sdxl, prompts, guidance)
    count.remove()
    conv.remove()
    assert alike(found, expected) and not alike(found, plain)
    assert set(seen) == {len(prompts) * (2 if guidance > 1 else 1)} == set(rows)
    assert torch.equal(draw(sdxl, prompts, guidance), plain)


def test_weights_masks_and_steps_of_references(sdxl, bank):
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    own = (Reference(weight=0.5), Reference(mask=mask, steps=(0.0, 0.7)))
    method = StyleID(references=own)
    cache = cache_features(sdxl, StyleID(), bank)
    outs = []
    for source in (bank, cache):
        with apply(sdxl, method, bank=source):
            outs.append(draw(sdxl))
    assert alike(outs[1], outs[0])


def test_a_folder(sdxl, bank, tmp_path):
    """Read step by step; the same cache again; gone and damaged files are named."""
    done = []
    kept = cache_features(sdxl, StyleID(), bank)
    cache = cache_features(
        sdxl, StyleID(), bank, place=tmp_path / "a" / "b", callback=lambda *x: done.append(x)
    )
    assert done == [(i + 1, STEPS) for i in range(STEPS)]
    assert not [p for p in (tmp_path / "a").iterdir() if p.name != "b"]
    assert cache.nbytes >= kept.nbytes
    outs = []
    for source in (kept, cache, FeatureCache.load(tmp_path / "a" / "b")):
        with apply(sdxl, StyleID(), bank=source):
            outs.append(draw(sdxl))
    assert torch.equal(outs[1], outs[0]) and torch.equal(outs[2], outs[0])
    weak = StyleID(references=(Reference(weight=0.5), Reference()))
    again = cache_features(sdxl, weak, bank, place=tmp_path / "a" / "b", callback=pytest.fail)
    assert again.references == weak.references
    with pytest.raises(ValueError, match="delete it, or name another folder"):
        cache_features(sdxl, StyleID(), bank, place=tmp_path / "a" / "b", guided=True)
    step = tmp_path / "a" / "b" / "step-0001.safetensors"
    step.write_bytes(step.read_bytes()[:100])
    with apply(sdxl, StyleID(), bank=cache), pytest.raises(FileRefused, match="not a whole"):
        draw(sdxl)
    step.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks step-0001"):
        FeatureCache.load(tmp_path / "a" / "b")


def test_nothing_is_half_written(sdxl, bank, tmp_path):
    processors = dict(sdxl.unet.attn_processors)

    def stop(done, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_features(sdxl, StyleID(), bank, place=tmp_path / "a", callback=stop)
    assert not list(tmp_path.iterdir())
    found = sdxl.unet.attn_processors
    assert all(found[name] is processor for name, processor in processors.items())


def test_a_stale_cache_says_why(sdxl, bank):
    cache = cache_features(sdxl, StyleID(), bank)
    other = tiny.sdxl(sample_size=8)
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    with pytest.raises(ValueError, match=r"of another model.*layers have none"):
        apply(other, StyleID(layers="all"), bank=cache)
    with pytest.raises(ValueError, match="they are for style_id, not style_aligned"):
        apply(sdxl, StyleAligned(), bank=cache)
    with apply(sdxl, StyleID(), bank=cache):
        with pytest.raises(ValueError, match=r"none of timestep 800; .* run of 3 steps"):
            draw(sdxl, steps=5)
        with pytest.raises(ValueError, match="unconditional rows have none"):
            draw(sdxl, guidance=3.0)
        with pytest.raises(ValueError, match=r"latents are \[4, 8, 8\], they were \[4, 16, 16\]"):
            sdxl("", height=16, width=16, num_inference_steps=STEPS, guidance_scale=1.0)


def test_what_is_refused(sdxl, bank):
    with pytest.raises(TypeError, match="style_aligned reads rows"):
        cache_features(sdxl, StyleAligned(), bank)
    lone = build_bank(sdxl, references()[0], StyleID(), num_inference_steps=2)
    with pytest.raises(ValueError, match="bank of 2 references"):
        cache_features(sdxl, StyleID(), lone)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a GPU"):
            cache_features(sdxl, StyleID(), bank, place="pinned")
