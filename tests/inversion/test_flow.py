"""Flow inversion: the solvers on velocity fields with a closed form, and on FLUX pipelines."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from styleattn.inversion import (
    FileRefused,
    HostUnsupported,
    Stopped,
    Trajectory,
    ddim_invert,
    flow,
    flow_host,
    flow_invert,
    flow_restore,
    flow_sample,
)

START = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
OPTIONS = {"num_inference_steps": 4, "height": 16, "width": 16, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def flux():
    import random_flux

    return random_flux


def linear(x: torch.Tensor, s: float) -> torch.Tensor:
    """dx/ds = 0.7 x + 3 s, of which x(s) = e^(0.7 s) (x0 + c) - c - 3/0.7 s, c = 3 / 0.49."""
    return 0.7 * x + 3 * s


def exact(s: float) -> torch.Tensor:
    c = 3 / 0.49
    return math.exp(0.7 * s) * (START + c) - c - 3 / 0.7 * s


def error(step, count: int) -> float:
    """After `count` steps from 0 to 1."""
    x = START
    for i in range(count):
        x = step(x, linear, i / count, (i + 1) / count)
    return float((x - exact(1.0)).abs().max())


@pytest.mark.parametrize(("step", "order"), [(flow.euler, 1), (flow.rf_solver, 2)])
def test_order_of_convergence(step, order):
    rates = [math.log2(error(step, n) / error(step, 2 * n)) for n in (32, 64, 128)]
    assert all(abs(rate - order) < 0.1 for rate in rates), rates


def test_the_half_step_is_the_derivative_as_printed():
    s, t = 0.3, 0.45
    h = t - s
    v = linear(START, s)
    derivative = (linear(START + h / 2 * v, s + h / 2) - v) / (h / 2)
    expected = START + h * v + h**2 / 2 * derivative
    assert torch.allclose(flow.rf_solver(START, linear, s, t), expected, atol=1e-14)


def test_a_straight_way_is_solved_exactly_by_all():
    """The velocity of one pair of data and noise: every solver meets the noise, in any steps."""
    noise = torch.tensor([[0.3, 0.1, -1.0]], dtype=torch.float64)
    steps = (
        flow.euler,
        flow.rf_solver,
        lambda x, v, s, t: flow.towards_noise(x, v, s, t, noise, 0.4),
    )
    for step in steps:
        x = START
        for s, t in itertools.pairwise((0.0, 0.2, 0.7, 1.0)):
            x = step(x, lambda x, s: noise - START, s, t)
        assert torch.allclose(x, noise, atol=1e-12)
    assert torch.equal(flow.noised(START, noise, 1.0), noise)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_controlled_equations(gamma):
    """For a velocity that vanishes, dx/ds = γ (ε - x)/(1 - s) has the solution
    x = ε + (x0 - ε)(1 - s)^γ; back likewise, x = x0 + (ε - x0) s^η."""
    noise, count = torch.tensor([[0.3, 0.1, -1.0]], dtype=torch.float64), 4000
    x, y = START, noise
    for i in range(count // 2):
        s, t = i / count, (i + 1) / count
        x = flow.towards_noise(x, lambda x, s: 0 * x, s, t, noise, gamma)
        y = flow.towards_data(y, lambda x, s: 0 * x, 1 - s, 1 - t, START, gamma)
    there = noise + (START - noise) * 0.5**gamma
    back = START + (noise - START) * 0.5**gamma
    assert torch.allclose(x, there, atol=2e-4) and torch.allclose(y, back, atol=2e-4)


@pytest.mark.parametrize("shifting", [False, True])
def test_levels_and_latents_are_the_pipelines_own(flux, shifting):
    """A recorded sampling is the pipeline's run, dynamic shifting included."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = flux.flux()
    given = {"base_image_seq_len": 16, "max_image_seq_len": 256, "shift": 3.0}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifting, **given)
    found = flow_sample(pipe, "a cat", **OPTIONS)
    start = pipe._pack_latents(found.latents[:1], 1, 1, 16, 16)
    seen: list[float] = []

    def note(pipe, step, timestep, kwargs):
        seen.append(float(timestep))
        return kwargs

    arguments = {**OPTIONS, "output_type": "latent", "callback_on_step_end": note}
    image = pipe("a cat", latents=start, **arguments).images
    ours = pipe._unpack_latents(image, 16, 16, pipe.vae_scale_factor)
    assert seen == pytest.approx(found.timesteps.tolist(), abs=1e-4)
    assert torch.allclose(ours, found.latents[-1:], atol=1e-5)
    assert found.labels == "flow" and found.method == "sample"


def test_packing(flux):
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    tokens = flux.flux()._pack_latents(x, 2, 3, 6, 8)
    assert torch.equal(flow_host.packed(x), tokens)
    assert torch.equal(flow_host.unpacked(tokens, 6, 8), x)


def test_latents_are_shifted_and_scaled(flux, picture):
    """The VAE gives back what was encoded, as the pipeline decodes it."""
    from styleattn.inversion.host import decode_latents

    pipe = flux.flux()
    found = flow_invert(pipe, picture, "", method="noised", **OPTIONS)
    clean = found.latents[-1:]
    config = pipe.vae.config
    raw = clean / config.scaling_factor + config.shift_factor
    with torch.no_grad():
        pixels = pipe.vae.decode(raw, return_dict=False)[0]
    shown = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    difference = torch.tensor(
        [
            a - b
            for a, b in zip(shown.tobytes(), decode_latents(pipe, clean)[0].tobytes(), strict=True)
        ]
    )
    assert int(difference.abs().max()) <= 1


def test_round_trips(flux, picture):
    """The second order's error is smaller, and falls faster with the number of steps."""
    pipe, found = flux.flux(), {}
    for method in ("euler", "rf_solver"):
        for steps in (4, 16):
            options = {**OPTIONS, "num_inference_steps": steps, "round_trip": True}
            trajectory = flow_invert(pipe, picture, "a cat", method=method, **options)
            found[method, steps] = trajectory.round_trip_error
            assert trajectory.method == method and len(trajectory) == steps
    assert found["rf_solver", 16] < 0.02
    assert all(found["rf_solver", n] < 0.5 * found["euler", n] for n in (4, 16))
    assert found["euler", 4] / found["euler", 16] > 3
    assert found["rf_solver", 4] / found["rf_solver", 16] > 8


def test_rf_inversion(flux, picture):
    """γ = 1 is the straight way to the noise; η = 1 the straight way back."""
    pipe = flux.flux()
    straight = flow_invert(pipe, picture, "", method="rf_inversion", gamma=1.0, seed=3, **OPTIONS)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(straight.latents[:1], noise, atol=1e-5)
    middle = flow.noised(straight.latents[-1:], noise, float(1 - straight.alphas[2]))
    assert torch.allclose(straight.latents[2:3], middle, atol=1e-5)
    plain = flow_invert(pipe, picture, "", method="rf_inversion", gamma=0.0, **OPTIONS)
    euler = flow_invert(pipe, picture, "", method="euler", **OPTIONS)
    assert torch.allclose(plain.latents, euler.latents, atol=1e-6)
    half = flow_invert(pipe, picture, "", method="rf_inversion", **OPTIONS)
    assert not torch.allclose(half.latents[0], plain.latents[0], atol=1e-2)
    clean = half.latents[-1:]
    options = {"max_sequence_length": 16, "steps": (0.0, 1.0)}
    assert torch.allclose(flow_restore(pipe, half, eta=1.0, **options), clean, atol=1e-5)
    errors = [
        float((flow_restore(pipe, half, eta=eta, **options) - clean).norm())
        for eta in (0.0, 0.5, 0.9)
    ]
    assert errors[0] > errors[1] > errors[2]
    falling = flow_restore(pipe, half, eta=0.9, power=4.0, **options)
    assert float((falling - clean).norm()) > errors[2]


def test_noised(flux, picture):
    found = flow_invert(flux.flux(), picture, "", method="noised", seed=1, **OPTIONS)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.latents[:1], noise)
    level = float(1 - found.alphas[2])
    assert found.method == "noised" and level == pytest.approx(0.5)
    rest = found.latents[2] - (1 - level) * found.latents[-1]
    assert rest.std() == pytest.approx(level, rel=0.2)


def test_it_goes_on_where_it_stopped(flux, picture, tmp_path):
    pipe, file = flux.flux(), tmp_path / "checkpoint"
    whole = flow_invert(pipe, picture, "a cat", **OPTIONS)
    options = {**OPTIONS, "checkpoint": file}
    with pytest.raises(Stopped, match="after 3 of 4"):
        flow_invert(pipe, picture, "a cat", callback=lambda done, total: done < 3, **options)
    seen: list[tuple[int, int]] = []
    again = flow_invert(
        pipe, picture, "a cat", callback=lambda *x: seen.append(x), round_trip=True, **options
    )
    assert seen == [(4, 8), (5, 8), (6, 8), (7, 8), (8, 8)]
    assert torch.equal(again.latents, whole.latents) and not file.exists()
    with pytest.raises(Stopped):
        flow_invert(pipe, picture, "a cat", callback=lambda *x: False, **options)
    with pytest.raises(ValueError, match="another inversion"):
        flow_invert(pipe, picture, "a dog", **options)


def test_files(flux, picture, tmp_path):
    found = flow_invert(flux.flux(), picture, "a cat", round_trip=True, **OPTIONS)
    found.save(tmp_path / "t.safetensors")
    again = Trajectory.load(tmp_path / "t.safetensors")
    assert torch.equal(again.latents, found.latents)
    assert torch.equal(again.timesteps, found.timesteps)
    assert again.summary() == found.summary()
    data = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "short").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileRefused):
        Trajectory.load(tmp_path / "short")


def test_guidance_is_told(flux, picture):
    """Where there is an embedding for it; elsewhere it is refused."""
    pipe = flux.flux()
    low, high = (
        flow_invert(pipe, picture, "", guidance_scale=g, **OPTIONS).latents[0] for g in (1.0, 7.0)
    )
    assert not torch.allclose(low, high, atol=1e-4)
    schnell = flux.flux(guidance_embeds=False)
    flow_invert(schnell, picture, "", **OPTIONS)
    with pytest.raises(ValueError, match="no guidance embedding"):
        flow_invert(schnell, picture, "", guidance_scale=2.0, **OPTIONS)


def test_given_latents(flux, picture):
    pipe = flux.flux()
    clean = flow_invert(pipe, picture, "", method="noised", **OPTIONS).latents[-1]
    options = {"num_inference_steps": 4, "max_sequence_length": 16}
    found = flow_invert(pipe, clean, "", **options)
    assert (found.height, found.width) == (16, 16)
    assert torch.equal(found.latents, flow_invert(pipe, picture, "", **OPTIONS).latents)
    for wrong, reason in (
        (clean[:, :15], "multiples of 2"),
        (clean.expand(3, -1, -1), r"must be \[1, h, w\]"),
        (clean / 0, "not finite"),
    ):
        with pytest.raises(ValueError, match=reason):
            flow_invert(pipe, wrong, "", **options)


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"method": "ddim"}, "method must be one of"),
        ({"method": "euler", "gamma": 0.5, "seed": 1}, "no gamma; euler draws no noise"),
        ({"method": "rf_inversion", "gamma": 1.5}, "gamma must lie in"),
        ({"method": "noised", "round_trip": True}, "no way leads back"),
        ({"height": 15}, "multiples of 2"),
        ({"num_inference_steps": 0}, "positive int"),
    ],
)
def test_refused_knobs(flux, picture, knobs, reason):
    with pytest.raises(ValueError, match=reason):
        flow_invert(flux.flux(), picture, "", **{**OPTIONS, **knobs})


def test_refused_hosts(flux, hosts, picture):
    with pytest.raises(HostUnsupported, match="20 channels"):
        flow_invert(flux.fill(), picture, "", **OPTIONS)
    with pytest.raises(HostUnsupported, match="no transformer"):
        flow_invert(hosts.sd(), picture, "", **OPTIONS)
    with pytest.raises(HostUnsupported, match="no unet"):
        ddim_invert(flux.flux(), picture, "")


def test_refused_restorations(flux, picture):
    pipe = flux.flux()
    noised = flow_invert(pipe, picture, "", method="noised", **OPTIONS)
    with pytest.raises(ValueError, match=r"no way back.*eta must lie.*steps must be"):
        flow_restore(pipe, noised, eta=2.0, steps=(0.5, 0.1))
    other = flow_invert(flux.flux(num_layers=1), picture, "", **OPTIONS)
    with pytest.raises(ValueError, match="another network"):
        flow_restore(pipe, other)
