"""ReNoise against its algorithm written out, and what it is for: a smaller round-trip error."""

from __future__ import annotations

import math

import pytest
import torch

from styleattn.inversion import ReNoise, Stopped, ddim, renoise, renoise_invert

ALPHAS = torch.linspace(0.9995, 0.01, 1000).double()


def network(x, t):
    """Curved enough that one fixed-point step is not the end."""
    return 0.7 * torch.sin(x) + 0.2 * math.cos(t / 200)


def correlation(x, rolls):
    total = 0.0
    for channel in x[0]:
        while True:
            r = int(torch.randint(0, channel.shape[0] // 2, (1,), generator=rolls))
            for axis in (0, 1):
                total = total + (channel * channel.roll(r, axis)).mean() ** 2
            if channel.shape[0] <= 8:
                break
            h, w = channel.shape
            channel = channel.reshape(h // 2, 2, w // 2, 2).mean((1, 3))
    return total


def divergence(x, aim):
    total = 0.0
    for c in range(4):
        for i in range(0, x.shape[2], 4):
            for j in range(0, x.shape[3], 4):
                a, b = (t[0, c, i : i + 4, j : j + 4] for t in (x, aim))
                v0, v1 = a.var(), b.var()
                total = total + abs(
                    math.log(1)
                    + torch.log((v1 + 1e-6) / (v0 + 1e-6))
                    + (v0 + (a.mean() - b.mean()) ** 2) / (v1 + 1e-6)
                    - 1
                )
    return total


def slope(x, loss):
    x = x.clone().requires_grad_()
    loss(x).backward()
    return x.grad


def pushed(noise, aim, rolls):
    """Four rounds: once towards the aim's patches, five times away from self-correlation."""
    for _ in range(4):
        noise = noise - 0.065 * slope(noise, lambda x: divergence(x, aim)).clip(-100, 100)
        for _ in range(5):
            noise = noise - 20 / 5 * slope(noise, lambda x: correlation(x, rolls))
    return noise


def written_out(clean, steps, further, seed=7865):
    x, path = clean, [clean]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    stride = 1000 // steps
    for n, t in enumerate(range(1, 1000, stride), 1):
        before = 1.0 if t < stride else float(ALPHAS[t - stride])
        now = float(ALPHAS[t])
        low, high = (0, 5) if t < 250 else (8, 10)
        rolls = torch.Generator().manual_seed(seed + n)
        aim = network(now**0.5 * clean + (1 - now) ** 0.5 * noise, t)

        def arrive(eps, x=x, before=before, now=now):
            root = (now / before) ** 0.5
            return root * x + ((1 - now) ** 0.5 - (now * (1 - before) / before) ** 0.5) * eps

        there, kept = x, []
        for i in range((min(further, 5) if t < 250 else further) + 1):
            eps = network(there, t)
            kept += [eps] if low <= i < high else []
            there = arrive(pushed(eps, aim, rolls) if i >= low else eps)
        if kept:
            there = arrive(pushed(sum(kept) / len(kept), aim, rolls))
        x = there
        path.append(x)
    return path


@pytest.mark.parametrize("further", [1, 9])
def test_the_algorithm(further):
    """Both ranges: with one further evaluation only the first steps are averaged and regularised;
    with nine the others are too."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 4, 8, 8, generator=generator).double()
    order = list(range(1, 1000, 250))
    plan = ddim.inversion_plan(order, ALPHAS.tolist(), 1.0)
    settings = ReNoise(steps=further)
    advance = renoise.renoising(plan, network, clean, settings, torch.device("cpu"))
    found = [clean]
    for _ in plan:
        found.append(advance(found))
    for ours, theirs in zip(found, written_out(clean, 4, further), strict=True):
        assert ddim.relative_error(ours, theirs) <= 1e-9


def test_regularisers():
    generator = torch.Generator().manual_seed(0)
    x, aim = torch.randn(2, 1, 4, 16, 16, generator=generator).double()
    found = renoise.patch_divergence(x, aim)
    assert float(found) == pytest.approx(float(divergence(x, aim)), rel=1e-9)
    found = renoise.self_correlation(x, torch.Generator().manual_seed(3))
    expected = correlation(x, torch.Generator().manual_seed(3))
    assert float(found) == pytest.approx(float(expected), rel=1e-9)
    correlated = x + 1.5
    after = renoise.regularised(correlated, aim, ReNoise(), torch.Generator().manual_seed(1))
    assert renoise.patch_divergence(after, aim) < renoise.patch_divergence(correlated, aim)
    wrong = torch.full_like(x, torch.nan)
    assert renoise.regularised(wrong, aim, ReNoise(), generator) is wrong  # discarded


def test_plain_renoising_is_more_exact_than_ddim():
    """Without regularisers the iteration solves the step that sampling undoes."""
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    order = list(range(1, 1000, 50))
    plan = ddim.inversion_plan(order, ALPHAS.tolist(), 1.0)
    back = ddim.sampling_plan(order[::-1], ALPHAS.tolist(), 1.0)
    errors = []
    for further in (0, 1, 4):
        settings = ReNoise(steps=further, average=False, lambda_ac=0.0, lambda_kl=0.0)
        advance = renoise.renoising(plan, network, clean, settings, torch.device("cpu"))
        found = [clean]
        for _ in plan:
            found.append(advance(found))
        end = list(ddim.run(found[-1], back, network))[-1]
        errors.append(ddim.relative_error(end, clean))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_on_a_pipeline(hosts, picture, tmp_path):
    """Goes on after a stop with the same bits; reports the round-trip error."""
    pipe, file = hosts.sd(), tmp_path / "checkpoint"
    options = {"num_inference_steps": 3, "round_trip": True}
    whole = renoise_invert(pipe, picture, "a cat", **options)
    with pytest.raises(Stopped):
        renoise_invert(
            pipe, picture, "a cat", **options, checkpoint=file, callback=lambda done, _: done < 2
        )
    again = renoise_invert(pipe, picture, "a cat", **options, checkpoint=file)
    assert torch.equal(whole.latents, again.latents) and not file.exists()
    assert whole.method == "renoise" and whole.round_trip_error is not None


def test_meaningless_numbers():
    with pytest.raises(ValueError, match=r"steps must not be negative.*rolls must be.*range must"):
        ReNoise(steps=-1, rolls=0, range=(3, 2))
