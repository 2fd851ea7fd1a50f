"""Pictures and files instead of embeddings and objects: encoded at `apply`, as diffusers encodes
them; what is missing is named."""

from __future__ import annotations

import checkpoints
import image_prompts as images
import pytest
import random_pipelines as tiny
import torch
from image_prompts import HIDDEN, encoder, extractor, picture
from safetensors.torch import save_file

from styleattn.adapters import ip_adapter_from
from styleattn.inversion import FileRefused
from styleattn.methods import IPAdapter
from styleattn.processors import apply
from styleattn.references import Reference

PROMPTS = ["a cat"]


@pytest.fixture(scope="module")
def pipe():
    made = tiny.sdxl()
    made.register_modules(image_encoder=encoder(), feature_extractor=extractor())
    return made


def layers_of(pipe):
    cross = pipe.unet.config.cross_attention_dim
    names = images.cross_layers(pipe.unet)
    return [(n, pipe.unet.get_submodule(n).inner_dim, cross) for n in names]


def state_of(pipe, kind):
    """A checkpoint of a kind, under flat names."""
    cross = pipe.unet.config.cross_attention_dim
    projection = {
        "base": checkpoints.base(images.WIDTH, cross),
        "plus": checkpoints.resampler(HIDDEN, 128, cross, 6, 2),
        "full-face": checkpoints.full_face(HIDDEN, cross),
    }[kind]
    return checkpoints.noise({**projection, **checkpoints.pairs(layers_of(pipe))}, 3)


def theirs(pipe, run, state, shown, scale=0.8):
    """diffusers' own loading and encoding."""
    pipe.unet._load_ip_adapter_weights([checkpoints.nested(state, ("image_proj", "ip_adapter"))])
    pipe.set_ip_adapter_scale(scale)
    try:
        return run(pipe, PROMPTS, ip_adapter_image=[shown])
    finally:
        parts = pipe.image_encoder, pipe.feature_extractor
        pipe.unload_ip_adapter()
        pipe.register_modules(image_encoder=parts[0], feature_extractor=parts[1])


@pytest.mark.parametrize("kind", ["base", "plus", "full-face"])
def test_pictures_are_encoded_as_diffusers_encodes_them(pipe, run, distance, kind, tmp_path):
    """Each kind's own output of the encoder, and what it takes for no image: zeros, or the mean
    grey; from a picture and from a path."""
    state = state_of(pipe, kind)
    expected = theirs(pipe, run, state, picture())
    adapter = ip_adapter_from(state, layers_of(pipe))
    file = tmp_path / "style.png"
    picture().save(file)
    for image in (picture(), file, str(file)):
        with apply(pipe, IPAdapter(0.8, adapter, references=Reference(image=image))):
            assert distance(run(pipe, PROMPTS), expected) <= 1e-5
    with apply(pipe, IPAdapter(0.8, adapter, references=Reference(image=picture(1)))):
        assert distance(run(pipe, PROMPTS), expected) > 1e-4


def test_a_picture_is_encoded_once(pipe, run):
    """Whatever the number of adapters and of calls of `apply`; another picture is another."""
    adapter = ip_adapter_from(state_of(pipe, "base"), layers_of(pipe))
    calls = []
    pipe.image_encoder = encoder(6)
    hook = pipe.image_encoder.register_forward_hook(lambda *a: calls.append(1))
    method = IPAdapter(0.8, adapter, references=Reference(image=picture()))
    apply(pipe, method, method).remove()
    apply(pipe, method).remove()
    assert len(calls) == 1
    apply(pipe, IPAdapter(0.8, adapter, references=Reference(image=picture(2)))).remove()
    assert len(calls) == 2
    hook.remove()


def test_a_picture_as_negative(pipe, run, distance):
    adapter = ip_adapter_from(state_of(pipe, "base"), layers_of(pipe))
    with torch.no_grad():
        both = [
            pipe.image_encoder(extractor()(p, return_tensors="pt").pixel_values).image_embeds[0]
            for p in (picture(0), picture(1))
        ]
    given = Reference(embeds=both[0], negative=both[1])
    shown = Reference(image=picture(0), negative=picture(1))
    out = []
    for reference in (given, shown):
        with apply(pipe, IPAdapter(0.8, adapter, references=reference)):
            out.append(run(pipe, PROMPTS))
    assert distance(out[1], out[0]) <= 1e-6


@pytest.mark.parametrize("form", ["safetensors", "bin", "folder"])
def test_adapters_from_files(pipe, run, distance, form, tmp_path):
    state = state_of(pipe, "base")
    expected = theirs(pipe, run, state, picture())
    path = tmp_path / f"ip.{'bin' if form == 'bin' else 'safetensors'}"
    if form == "bin":
        torch.save(checkpoints.nested(state, ("image_proj", "ip_adapter")), path)
    else:
        save_file(state, path)
    place = tmp_path if form == "folder" else path
    method = IPAdapter(0.8, str(place), references=Reference(image=picture()))
    again = IPAdapter.from_dict({**method.to_dict(), "references": method.references})
    with apply(pipe, again):
        assert distance(run(pipe, PROMPTS), expected) <= 1e-5


def test_an_encoder_from_a_folder(pipe, run, distance, tmp_path):
    """For a pipeline without one; preprocessed as the adapter's encoder was trained."""
    state = state_of(pipe, "base")
    expected = theirs(pipe, run, state, picture())
    adapter = ip_adapter_from(state, layers_of(pipe))
    pipe.image_encoder.save_pretrained(tmp_path)
    bare = tiny.sdxl()
    bare.unet = pipe.unet
    for place in (str(tmp_path), pipe.image_encoder):
        method = IPAdapter(0.8, adapter, references=Reference(image=picture()), image_encoder=place)
        with apply(bare, method):
            assert distance(run(bare, PROMPTS), expected) <= 1e-5


def test_what_is_missing_is_named(pipe, tmp_path):
    adapter = ip_adapter_from(state_of(pipe, "base"), layers_of(pipe))
    shown = Reference(image=picture())

    def refused(error, match, target=pipe, **knobs):
        with pytest.raises(error, match=match):
            apply(target, IPAdapter(0.8, **{"adapter": adapter, "references": shown, **knobs}))
        assert not hasattr(pipe.unet, "_styleattn_controller")

    bare = tiny.sdxl()
    bare.unet = pipe.unet
    refused(ValueError, "the pipeline has none: give the method `image_encoder`", bare)
    refused(ValueError, "there is no pipeline: give the method", pipe.unet)
    refused(ValueError, r"needs a picture \(`image`\) or", references=Reference())
    refused(ValueError, "has an adapter but no references", references=None)
    refused(ValueError, "references but no adapter", adapter=None)
    refused(FileNotFoundError, "no such picture", references=Reference(image="none.png"))
    refused(FileNotFoundError, "no such adapter file: none.bin", adapter="none.bin")
    refused(FileNotFoundError, "has no adapter file", adapter=tmp_path)
    refused(FileNotFoundError, r"image_encoder: .* has no config.json", image_encoder=tmp_path)
    for name in ("a.safetensors", "b.bin"):
        (tmp_path / name).write_bytes(b"nothing")
    refused(ValueError, "several adapter files; name one: a.safetensors, b.bin", adapter=tmp_path)
    refused(FileRefused, "neither a whole safetensors file", adapter=tmp_path / "a.safetensors")

    class Bare:
        def tokens(self, embeds):
            return embeds

        negative = key_value = tokens

    refused(ValueError, "a Bare, does not say what encodes its pictures", adapter=Bare())


def test_an_encoder_of_another_width(pipe):
    cross = pipe.unet.config.cross_attention_dim
    shapes = {**checkpoints.base(40, cross), **checkpoints.pairs(layers_of(pipe))}
    adapter = ip_adapter_from(checkpoints.noise(shapes), layers_of(pipe))
    with pytest.raises(ValueError, match=r"of width 40; the image encoder, a CLIP.* width 24"):
        apply(pipe, IPAdapter(1.0, adapter, references=Reference(image=picture())))
