"""StyleAligned against the official formulation: knob by knob, layer by layer, through whole
UNets."""

from __future__ import annotations

import contextlib
import math

import official_style_aligned as official
import pytest
import torch
from diffusers.models.attention_processor import Attention

from styleattn.methods import StyleAligned
from styleattn.processors import apply

KNOBS = [
    {},
    {"share_group_norm": False},
    {"adain_queries": False},
    {"adain_keys": False, "share_group_norm": False},
    {"adain_values": True},
    {"share_attention": False},
    {"full_attention_share": True},
    {"full_attention_share": True, "share_group_norm": False},
    {"shared_score_scale": 0.5},
    {"shared_score_shift": math.log(2)},
    {"shared_score_scale": 1.3, "shared_score_shift": -0.4, "adain_values": True},
    {"only_self_level": 0.4},
    {"only_self_level": 0.6, "shared_score_shift": math.log(2)},
    {"only_self_level": 1.0},
]
IDS = ["-".join(k) or "default" for k in KNOBS]


@contextlib.contextmanager
def in_double(pipe):
    parts = [getattr(pipe, n, None) for n in ("unet", "text_encoder", "text_encoder_2")]
    parts = [part.double() for part in parts if part is not None]
    yield
    for part in parts:
        part.float()


@pytest.mark.parametrize("knobs", KNOBS, ids=IDS)
def test_whole_unet_fp32(sdxl3, run, distance, knobs):
    with official.styled(sdxl3.unet, official.Args(**knobs)):
        expected = run(sdxl3)
    with apply(sdxl3, StyleAligned(**knobs)):
        assert distance(run(sdxl3), expected) <= 1e-5
    if knobs.get("only_self_level") != 1.0:
        assert distance(run(sdxl3)[1:], expected[1:]) > 1e-3  # the style is visible


@pytest.mark.parametrize("knobs", KNOBS[::2], ids=IDS[::2])
def test_whole_unet_fp64(pipe, run, distance, knobs):
    with in_double(pipe):
        with official.styled(pipe.unet, official.Args(**knobs)):
            expected = run(pipe, steps=3)
        with apply(pipe, StyleAligned(**knobs), backend="reference"):
            assert distance(run(pipe, steps=3), expected) <= 1e-12


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_backends_agree(sdxl3, run, distance, backend):
    knobs = {"shared_score_shift": math.log(2), "shared_score_scale": 0.8, "adain_values": True}
    with official.styled(sdxl3.unet, official.Args(**knobs)):
        expected = run(sdxl3)
    with apply(sdxl3, StyleAligned(**knobs), backend=backend):
        assert distance(run(sdxl3), expected) <= 1e-5


def test_sharing_layer_norms_changes_nothing(pipe, run):
    """LayerNorm is per token: concatenated tokens do not meet in it."""
    out = []
    for share in (True, False):
        with apply(pipe, StyleAligned(share_layer_norm=share)):
            out.append(run(pipe))
    assert torch.equal(*out)


def test_without_guidance_every_row_has_one_reference(sdxl3, run, distance):
    with official.styled(sdxl3.unet, official.Args(), halves=1):
        expected = run(sdxl3, guidance_scale=1.0)
    with apply(sdxl3, StyleAligned()):
        assert distance(run(sdxl3, guidance_scale=1.0), expected) <= 1e-5


@pytest.mark.parametrize("knobs", KNOBS[:11], ids=IDS[:11])
@pytest.mark.parametrize("tokens", [1, 63, 257])
def test_per_layer(knobs, tokens, distance):
    """A standalone Attention with every projection option, strong channel means, odd lengths."""
    if tokens == 1 and knobs.get("full_attention_share") is None:
        pytest.skip("one token has no variance upstream")
    torch.manual_seed(0)
    attn = Attention(
        query_dim=32,
        heads=2,
        dim_head=16,
        bias=True,
        residual_connection=True,
        rescale_output_factor=1.7,
    ).eval()
    x = torch.randn(6, tokens, 32) + 4 * torch.randn(6, 1, 32)
    holder = Holder(attn)
    with torch.no_grad():
        expected = official.Processor(official.Args(**knobs), 2)(attn, x)
        with holder.styled(StyleAligned(**knobs)):
            got = attn(x)
    assert distance(got, expected) <= 1e-5


class Holder:
    """One Attention under a controller, as a host would set it up."""

    def __init__(self, attn):
        self.attn = attn

    def styled(self, method, count=3, references=(0,), backend=None):
        from styleattn.methods import Layer, Rows
        from styleattn.processors._attention import Site
        from styleattn.processors._controller import Controller, Now
        from styleattn.references import Reference

        @contextlib.contextmanager
        def scope():
            given = method.references or (Reference(),)
            controller = Controller([method], [given], None, backend)
            weights = tuple(r.weight for r in given)
            site = Site(controller, Layer("attn1", 0, 1), 0, 1.0, weights, self.attn.processor)
            controller.sites.append((self.attn, site))
            controller.install(self.attn)
            controller._hooks.pop().remove()  # this module is the layer, not a denoiser
            controller._hooks.pop().remove()
            controller.now = Now(Rows(2, count, references), (1.0,), ((1.0,) * len(given),), (1, 1))
            try:
                yield controller
            finally:
                controller.uninstall(self.attn)

        return scope()


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": "layer_norm"},
        {"norm_num_groups": 4},
        {"out_bias": False, "residual_connection": True},
        {"scale_qk": False},
    ],
    ids=lambda o: next(iter(o)),
)
def test_layer_options_of_the_host_are_honoured(options, distance):
    """With nothing to share (weight far below every number) a styled layer is the host's own
    layer."""
    from styleattn.references import Reference

    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8, bias=True, **options).eval()
    x = torch.randn(6, 20, 32)
    faint = StyleAligned(references=(Reference(weight=1e-30),))
    with torch.no_grad():
        expected = attn(x)
        with Holder(attn).styled(faint):
            assert distance(attn(x), expected) <= 1e-5


def test_maps_of_four_dimensions(distance):
    from styleattn.references import Reference

    torch.manual_seed(0)
    attn = Attention(
        query_dim=32, heads=4, dim_head=8, norm_num_groups=8, residual_connection=True
    ).eval()
    x = torch.randn(6, 32, 5, 7)
    with torch.no_grad():
        expected = attn(x)
        with Holder(attn).styled(StyleAligned(references=(Reference(weight=1e-30),))):
            assert distance(attn(x), expected) <= 1e-5
        with Holder(attn).styled(StyleAligned()):
            got = attn(x)
    assert distance(got[[0, 3]], expected[[0, 3]]) <= 1e-5
    assert distance(got[1:3], expected[1:3]) > 1e-3
