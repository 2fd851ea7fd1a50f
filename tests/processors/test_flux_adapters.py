"""IP-Adapters as methods on FLUX: XLabs' against diffusers, InstantX's against its formula."""

from __future__ import annotations

import pytest
import random_flux
import torch
from random_flux import EACH, PROMPTS, ip_adapter, load_ip_adapter, relative, run

from styleattn.adapters import load_flux_ip_adapter
from styleattn.methods import InstantStyle, IPAdapter, Redux, StyleAligned
from styleattn.processors import apply
from styleattn.processors.flux import joint_attention_layers
from styleattn.references import Reference

torch.set_num_threads(1)
EMBEDS = EACH[0, 0]
BLACK = torch.zeros(32)


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux()


@pytest.fixture(scope="module")
def stock():
    """diffusers with the same adapter loaded."""
    pipe = random_flux.flux()
    load_ip_adapter(pipe)
    return pipe


@pytest.fixture(scope="module")
def xlabs(pipe, tmp_path_factory):
    """The adapter of `load_ip_adapter` as a file."""
    from safetensors.torch import save_file

    parts = ip_adapter(pipe.transformer)
    tensors = {f"image_proj.{n}": t for n, t in parts["image_proj"].items()}
    tensors |= {f"ip_adapter.{n}": t for n, t in parts["ip_adapter"].items()}
    path = tmp_path_factory.mktemp("xlabs") / "adapter.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def instantx(pipe, tmp_path_factory):
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(4)
    shapes = {"proj.0.weight": (48, 24), "proj.0.bias": (48,), "proj.2.weight": (5 * 32, 48)}
    shapes |= {"proj.2.bias": (5 * 32,), "norm.weight": (32,), "norm.bias": (32,)}
    tensors = {f"image_proj.{n}": torch.randn(s, generator=g) / 4 for n, s in shapes.items()}
    for i in range(4):
        for part in "kv":
            weight = torch.randn(32, 32, generator=g)
            tensors[f"ip_adapter.{i}.to_{part}_ip.weight"] = weight
    path = tmp_path_factory.mktemp("instantx") / "adapter.safetensors"
    save_file(tensors, path)
    return path


def shown(weight=1.0, embeds=EMBEDS, negative=BLACK, **more):
    return (Reference(embeds=embeds, negative=negative, weight=weight, **more),)


def of_diffusers(pipe, scale, embeds=EACH[:1], **arguments):
    pipe.set_ip_adapter_scale(scale)
    none = torch.zeros(1, 1, 32)
    return run(
        pipe,
        ip_adapter_image_embeds=[embeds],
        negative_ip_adapter_image_embeds=[none],
        **arguments,
    )


@pytest.mark.parametrize("scale", [1.0, [0.7, 0.3]])
def test_xlabs_is_what_diffusers_makes_of_it(pipe, stock, xlabs, scale):
    expected = of_diffusers(stock, scale)
    if isinstance(scale, list):  # InstantStyle's weights per block
        methods = [
            IPAdapter(adapter=xlabs, scale=s, references=shown(), layers=f"transformer_blocks.{i}")
            for i, s in enumerate(scale)
        ]
    else:
        methods = [IPAdapter(adapter=xlabs, scale=scale, references=shown())]
    with apply(pipe, *methods):
        got = run(pipe)
    assert relative(got, expected) <= 1e-5
    assert relative(got, run(pipe)) > 1e-3


def test_instant_style_has_a_weight_for_every_block(pipe, stock, xlabs):
    """Of an adapter of its own as diffusers' list of scales; of one that diffusers loaded as a
    factor. Presets of UNets are refused."""
    expected = of_diffusers(stock, [0.7, 0.3])
    with apply(pipe, InstantStyle(adapter=xlabs, references=shown(), blocks=[0.7, 0.3])):
        assert relative(run(pipe), expected) <= 1e-5
    with apply(stock, InstantStyle(blocks={"transformer_blocks.1": 0.5})):
        found = of_diffusers(stock, [0.7, 0.6])
    assert relative(found, of_diffusers(stock, [0.0, 0.3])) <= 1e-5
    with pytest.raises(ValueError, match="no preset has been measured for a FLUX of 2 double"):
        apply(pipe, InstantStyle(adapter=xlabs, references=shown()))


def test_xlabs_under_true_guidance(pipe, stock, xlabs):
    """The second call sees the negative image."""
    guided = {"negative_prompt": ["ugly"] * 3, "true_cfg_scale": 2.0}
    expected = of_diffusers(stock, 0.8, **guided)
    with apply(pipe, IPAdapter(adapter=xlabs, references=shown(0.8))):
        assert relative(run(pipe, **guided), expected) <= 1e-5


def test_a_range_of_steps(pipe, stock, xlabs):
    """diffusers has none: its callback sets the scale to 0 after half of the steps."""

    def rest(pipe, step, t, kwargs):
        if step == 1:
            pipe.set_ip_adapter_scale(0.0)
        return kwargs

    expected = of_diffusers(stock, 1.0, steps=4, callback_on_step_end=rest)
    with apply(pipe, IPAdapter(adapter=xlabs, references=shown(), steps=(0.0, 0.5))):
        assert relative(run(pipe, steps=4), expected) <= 1e-5


def test_factors_on_an_adapter_that_diffusers_loaded(stock):
    expected = of_diffusers(stock, [0.0, 0.35])
    with apply(stock, IPAdapter(scale=0.5, layers="transformer_blocks.1")):
        assert relative(of_diffusers(stock, 0.7), expected) <= 1e-5


def test_masks_and_prompts(pipe, xlabs):
    plain = run(pipe)
    zeros = shown(mask=torch.zeros(4, 4))
    with apply(pipe, IPAdapter(adapter=xlabs, references=zeros)):
        assert relative(run(pipe), plain) <= 1e-5
    with apply(pipe, IPAdapter(adapter=xlabs, references=shown())):
        expected = run(pipe)
    with apply(pipe, IPAdapter(adapter=xlabs, references=shown(mask=torch.ones(3, 5)))):
        assert relative(run(pipe), expected) <= 1e-5
    with apply(pipe, IPAdapter(adapter=xlabs, references=shown(prompts=(1,)))):
        one = run(pipe)
    assert relative(one[1], expected[1]) <= 1e-5
    assert relative(one[[0, 2]], plain[[0, 2]]) <= 1e-5


class InstantX:
    """The adapter written out: added to the attention, image queries in double blocks, all queries
    in single blocks; keys and values normalised per head."""

    def __init__(self, pipe, path, weight):
        from safetensors.torch import load_file

        t = load_file(path)
        hidden = torch.nn.functional.gelu(
            self.embeds @ t["image_proj.proj.0.weight"].T + t["image_proj.proj.0.bias"]
        )
        tokens = (hidden @ t["image_proj.proj.2.weight"].T + t["image_proj.proj.2.bias"]).view(
            5, 32
        )
        tokens = torch.nn.functional.layer_norm(
            tokens, (32,), t["image_proj.norm.weight"], t["image_proj.norm.bias"]
        )
        self.weight, self.hooks = weight, []
        for i, attn in enumerate(joint_attention_layers(pipe.transformer).values()):
            pair = [tokens @ t[f"ip_adapter.{i}.to_{p}_ip.weight"].T for p in "kv"]
            heads = [x.view(5, 2, 16).transpose(0, 1) for x in pair]
            self.hook(attn, *(x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() for x in heads))

    embeds = torch.randn(24, generator=torch.Generator().manual_seed(3))

    def hook(self, attn, key, value):
        kept = []

        def remember(module, args, output):
            kept[:] = [output.unflatten(-1, (2, 16))]

        def added():
            q = attn.norm_q(kept[0]).transpose(1, 2)
            p = (q @ key.transpose(-1, -2) / 4).softmax(-1)
            return self.weight * (p @ value).transpose(1, 2).flatten(2)

        self.hooks.append(attn.to_q.register_forward_hook(remember))
        if hasattr(attn, "to_out"):
            before = attn.to_out[0].register_forward_pre_hook(lambda m, args: (args[0] + added(),))
            self.hooks.append(before)
        else:
            self.hooks.append(attn.register_forward_hook(lambda m, args, out: out + added()))

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def test_instantx_is_its_formula(pipe, instantx):
    written = InstantX(pipe, instantx, 0.7)
    expected = run(pipe)
    written.remove()
    references = shown(0.7, InstantX.embeds, torch.zeros(24))
    with apply(pipe, IPAdapter(adapter=instantx, references=references)) as handle:
        got = run(pipe)
        assert [r.method for r in handle.explain().rows] == ["ip_adapter"] * 4
    assert relative(got, expected) <= 1e-5
    assert relative(got, run(pipe)) > 1e-3


def test_both_makes_with_everything_else(pipe, xlabs, instantx):
    """Each alone is what is left when the others have no weight; together they all speak."""
    x = IPAdapter(adapter=xlabs, references=shown())
    i = IPAdapter(adapter=instantx, references=shown(1.0, InstantX.embeds, torch.zeros(24)))
    redux = Redux(references=(Reference(embeds=torch.randn(4, 32)),))
    with apply(pipe, x, i, redux, StyleAligned()):
        together = run(pipe)
    for left_out in ([i, redux], [x, redux], [x, i, StyleAligned()]):
        with apply(pipe, *left_out):
            assert relative(run(pipe)[1:], together[1:]) > 1e-3
    mute = Redux(references=(Reference(embeds=torch.randn(4, 32)),), strength=0.0)
    with apply(pipe, x):
        expected = run(pipe)
    with apply(pipe, x, mute):
        assert relative(run(pipe), expected) <= 1e-5


def test_fill_which_has_no_adapters_of_its_own(xlabs):
    fill = random_flux.fill()
    adapter = load_flux_ip_adapter(
        xlabs,
        [(n, 32, 32) for n in joint_attention_layers(fill.transformer)],
        head_dim=16,
    )
    plain = random_flux.paint(fill)
    with apply(fill, IPAdapter(adapter=adapter, references=shown())):
        assert relative(random_flux.paint(fill), plain) > 1e-3
    assert torch.equal(random_flux.paint(fill), plain)


def test_kontext_whose_picture_sees_them_too(xlabs):
    """What diffusers makes of the adapter that it loads; a mask keeps them from the picture."""
    pipe = random_flux.kontext()

    def go(**arguments):
        return pipe(
            image=random_flux.PICTURE.resize((16, 16)),
            prompt=list(PROMPTS),
            height=16,
            width=16,
            max_area=256,
            _auto_resize=False,
            max_sequence_length=16,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **arguments,
        ).images

    adapter = load_flux_ip_adapter(
        xlabs, [(n, 32, 32) for n in joint_attention_layers(pipe.transformer)], head_dim=16
    )
    plain = go()
    with apply(pipe, IPAdapter(adapter=adapter, references=shown())):
        found = go()
    assert relative(found, plain) > 1e-3
    whole = shown(mask=torch.ones(4, 4))
    with apply(pipe, IPAdapter(adapter=adapter, references=whole)):
        assert relative(go(), found) > 1e-4
    assert torch.equal(go(), plain)
    random_flux.load_ip_adapter(pipe)
    none = [torch.zeros(1, 1, 32)]
    theirs = go(ip_adapter_image_embeds=[EACH[:1]], negative_ip_adapter_image_embeds=none)
    pipe.unload_ip_adapter()
    with apply(pipe, IPAdapter(adapter=adapter, references=shown())):
        assert relative(go(), theirs) <= 1e-5


def test_what_does_not_fit_is_refused_whole(pipe, xlabs):
    before = dict(pipe.transformer.attn_processors)

    class Other:
        kind = "plus"

    with pytest.raises(ValueError, match="this one is 'plus'"):
        apply(pipe, IPAdapter(adapter=Other(), references=shown()))
    with pytest.raises(ValueError, match="no references"):
        apply(pipe, IPAdapter(adapter=xlabs))
    with pytest.raises(FileNotFoundError):
        apply(pipe, IPAdapter(adapter="nowhere.safetensors", references=shown()))
    assert all(p is before[n] for n, p in pipe.transformer.attn_processors.items())
