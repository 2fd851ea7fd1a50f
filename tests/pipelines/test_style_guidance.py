"""Guidance by CSD against the whole computation in one graph, kept in memory."""

from __future__ import annotations

import image_prompts as images
import pytest
import torch
from torch.nn import functional as F

from styleattn.adapters import CSD
from styleattn.adapters.csd import VisionTower
from styleattn.methods import InstantStylePlus
from styleattn.pipelines.style_guidance import Aim, latent_gradient, led, recomputed
from styleattn.processors import apply
from styleattn.references import Reference

OUT = 8
STYLE, CONTENT = 30.0, 20.0
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def csd_model(side: int = 20, depth: int = 2) -> CSD:
    torch.manual_seed(7)
    tower = VisionTower(64, patch=4, positions=(side // 4) ** 2 + 1, depth=depth)
    model = CSD(tower, 64, OUT)
    for name, parameter in model.named_parameters():
        if ".ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def aims(csd: CSD) -> Aim:
    g = torch.Generator().manual_seed(3)
    style, content = F.normalize(torch.randn(2, OUT, generator=g), dim=-1)
    return Aim(csd, style, content, STYLE, CONTENT)


def one_graph(pipe, aim, x, timestep, arguments):
    """sqrt(1 - abar) times the gradient of the loss, written out; x [n, 4, h, w]."""
    alpha = float(pipe.scheduler.alphas_cumprod[timestep])
    root = (1 - alpha) ** 0.5
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        eps = pipe.unet(torch.cat([x, x]), timestep, **arguments, return_dict=False)[0][: len(x)]
        clean = (x - root * eps) / alpha**0.5
        seen = root * clean + (1 - root) * x
        picture = pipe.vae.decode(seen / pipe.vae.config.scaling_factor).sample
        picture = ((picture + 1) / 2).clamp(0, 1)
        side = aim.csd.image_size
        picture = F.interpolate(picture, (side, side), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        _, content, style = aim.csd((picture - mean) / std)
        loss = -(STYLE * style @ aim.style + CONTENT * content @ aim.content).sum()
        (grad,) = torch.autograd.grad(loss, x)
    return root * grad


class Calls:
    """The network's inputs and answers of a run, as a pipeline sees them."""

    def __init__(self, pipe):
        self.inputs, self.outputs, self.unet = [], [], pipe.unet

    def __enter__(self):
        self.before = self.unet.register_forward_pre_hook(self.ask, with_kwargs=True, prepend=True)
        self.after = self.unet.register_forward_hook(self.answer)
        return self

    def __exit__(self, *error):
        self.before.remove()
        self.after.remove()

    def ask(self, module, args, kwargs):
        self.inputs.append((args, kwargs))

    def answer(self, module, args, output):
        self.outputs.append(output[0].clone())


def run(pipe, steps=2, n=1, **more):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(n, 4, 16, 16, generator=g)
    return pipe(
        ["a cat", "a dog"][:n],
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="latent",
        **more,
    ).images


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


class Plus:
    """What guidance did to the first call of a run, and what it should have done."""

    def __init__(self, pipe, aim, n=1, **more):
        with led(pipe, aim), Calls(pipe) as calls:  # the recorder hears the led answer first
            run(pipe, 2, n, **more)
        (args, kwargs), led_answer = calls.inputs[0], calls.outputs[1]
        with torch.no_grad():
            plain = pipe.unet(*args, **kwargs)[0]
        self.change = (led_answer - plain).chunk(2)
        arguments = {k: v for k, v in kwargs.items() if k not in ("return_dict", "timestep_cond")}
        x, timestep = args[0][:n], int(args[1])
        self.expected = one_graph(pipe, aim, x, timestep, arguments)


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_added_is_the_gradient(hosts, n):
    """To both rows of guidance, so that the guided noise gets it once; per picture."""
    pipe, aim = hosts.sdxl(), aims(csd_model())
    found = Plus(pipe, aim, n)
    for change in found.change:
        assert relative(change, found.expected) < 1e-5
    assert found.expected.abs().max() > 1e-3


def test_controlnets_residuals_are_in_the_gradient(hosts):
    pipe, aim = hosts.sdxl_controlnet(), aims(csd_model())
    found = Plus(pipe, aim, image=images.picture(3, (32, 32)))
    assert relative(found.change[0], found.expected) < 1e-5


def styled(pipe, state):
    from styleattn.adapters import ip_adapter_from

    layers = [
        (n, pipe.unet.get_submodule(n).inner_dim, pipe.unet.config.cross_attention_dim)
        for n in images.cross_layers(pipe.unet)
    ]
    adapter = ip_adapter_from(images.flat(state), layers)
    style = Reference(embeds=images.embeds(1), layers="up_blocks.0*")
    references = (Reference(embeds=images.embeds(0)), style)
    return InstantStylePlus(adapter=adapter, references=references)


def test_under_a_style(hosts):
    """Content and style are in the gradient, though the blocks are computed again after the call
    is over; and the rows without conditions see no image."""
    pipe, aim = hosts.sdxl(), aims(csd_model())
    state = images.checkpoint(pipe.unet)
    none = torch.zeros(images.WIDTH)
    rows = [[none], [images.embeds(0)]], [[none], [images.embeds(1)]]
    shown = [
        images.Shown(state, rows[0], 0.2),
        images.Shown(state, rows[1], 1.2, layers={"up_blocks.0": 1.0}),
    ]
    with apply(pipe, styled(pipe, state)), led(pipe, aim), Calls(pipe) as calls:
        run(pipe, 2)
    (args, kwargs), answer = calls.inputs[0], calls.outputs[1]
    arguments = {k: v for k, v in kwargs.items() if k not in ("return_dict", "timestep_cond")}
    with images.written(pipe.unet, shown):
        with torch.no_grad():
            plain = pipe.unet(*args, **kwargs)[0]
        expected = one_graph(pipe, aim, args[0][:1], int(args[1]), arguments)
    assert relative(answer[:1], plain[:1] + expected) < 1e-5
    assert relative((answer - plain)[:1], expected) < 1e-4  # a small difference of large numbers


def test_whole_runs_of_instant_style_plus(hosts):
    """Two softmaxes next to the text's at every step, without guidance by CSD."""
    pipe = hosts.sdxl()
    state, none = images.checkpoint(pipe.unet), torch.zeros(images.WIDTH)
    rows = [[none], [images.embeds(0)]], [[none], [images.embeds(1)]]
    shown = [
        images.Shown(state, rows[0], 0.2),
        images.Shown(state, rows[1], 1.2, layers={"up_blocks.0": 1.0}),
    ]
    plain = run(pipe, 3)
    with images.written(pipe.unet, shown):
        expected = run(pipe, 3)
    with apply(pipe, styled(pipe, state)):
        found = run(pipe, 3)
    assert relative(found, expected) < 1e-5 and relative(plain, expected) > 1e-3
    assert torch.equal(run(pipe, 3), plain)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_what_other_networks_predict(hosts, kind):
    """The noise that their answer stands for moves by the same gradient."""
    pipe, aim = hosts.sdxl(), aims(csd_model())
    from styleattn.inversion.ddim import to_epsilon

    pipe.scheduler.register_to_config(prediction_type=kind)
    with led(pipe, aim), Calls(pipe) as calls:
        run(pipe, 2)
    (args, kwargs), answer = calls.inputs[0], calls.outputs[1]
    with torch.no_grad():
        plain = pipe.unet(*args, **kwargs)[0]
    x, timestep = args[0][:1], int(args[1])
    alpha = float(pipe.scheduler.alphas_cumprod[timestep])
    leaf = x.clone().requires_grad_()
    arguments = {k: v for k, v in kwargs.items() if k not in ("return_dict", "timestep_cond")}
    with torch.enable_grad():
        out = pipe.unet(torch.cat([leaf, leaf]), timestep, **arguments, return_dict=False)[0][:1]
        eps, root = to_epsilon(out, leaf, alpha, kind), (1 - alpha) ** 0.5
        seen = root * (leaf - root * eps) / alpha**0.5 + (1 - root) * leaf
        decoded = pipe.vae.decode(seen / pipe.vae.config.scaling_factor).sample
        (grad,) = torch.autograd.grad(aim.loss((decoded + 1) / 2), leaf)
    moved = to_epsilon(answer[:1], x, alpha, kind) - to_epsilon(plain[:1], x, alpha, kind)
    assert relative(moved, root * grad) < 1e-4


def test_the_picture_moves_towards_the_style(hosts):
    """The loss of the first guess falls along what is taken off the noise."""
    pipe, aim = hosts.sdxl(), aims(csd_model())
    z = 0.5 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    pull = latent_gradient(pipe.vae, aim, z)
    with torch.no_grad():
        before, after = (
            aim.loss((pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample + 1) / 2)
            for x in (z, z - 1e-3 * pull / pull.norm())
        )
    assert after < before


def test_everything_is_given_back(hosts):
    pipe, aim = hosts.sdxl(), aims(csd_model())
    before = run(pipe)
    with pytest.raises(RuntimeError, match="stop"), led(pipe, aim):
        assert not any(p.requires_grad for p in pipe.unet.parameters())
        assert not torch.equal(run(pipe), before)
        raise RuntimeError("stop")
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert not any("forward" in m.__dict__ for m in (*pipe.unet.modules(), *pipe.vae.modules()))
    assert torch.equal(run(pipe), before)


def test_a_forward_of_somebody_else_is_kept():
    layer = torch.nn.Linear(2, 2)
    layer.forward = mine = lambda x: x + 1
    with recomputed([layer]):
        assert layer.forward is not mine and float(layer(torch.zeros(()))) == 1
    assert layer.forward is mine


def peak(work):
    """Bytes at the peak of what a piece of work allocates."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def test_peak_memory(hosts):
    """Far below that of one graph over UNet, VAE and CSD."""
    pipe, aim = hosts.sdxl(layers_per_block=3), aims(csd_model(depth=8))
    with Calls(pipe) as calls:
        run(pipe, 2)
    args, kwargs = calls.inputs[0]
    arguments = {k: v for k, v in kwargs.items() if k not in ("return_dict", "timestep_cond")}
    big = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    timestep = int(args[1])

    def naive():
        one_graph(pipe, aim, big, timestep, arguments)

    def ours():
        pipe._guidance_scale = 3.0
        with led(pipe, aim), torch.no_grad():
            pipe.unet(torch.cat([big, big]), timestep, **arguments, return_dict=False)

    naive_peak, our_peak = peak(naive), peak(ours)
    assert our_peak < 0.5 * naive_peak, (our_peak, naive_peak)
