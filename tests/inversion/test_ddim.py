"""The DDIM formulas against numpy written from the paper, and against diffusers' own inverse
scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from styleattn.inversion import ddim

TRAIN = 1000


def schedule(kind: str = "scaled_linear") -> np.ndarray:
    if kind == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAIN) ** 2
    elif kind == "linear":
        betas = np.linspace(1e-4, 2e-2, TRAIN)
    else:
        bar = np.cos((np.arange(TRAIN + 1) / TRAIN + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    return np.cumprod(1 - betas)


def smooth(x, t):
    """A noise function that changes slowly in both arguments, for tensors and arrays."""
    return 0.6 * x + 0.1 * np.sin(t / 300.0)


def numpy_inversion(x, steps, alphas, final, labels="paper"):
    """The official inversion, written out: t ascending, t_prev = t - 1000 // N."""
    stride = TRAIN // steps
    found = [x]
    if (
        labels == "style_id"
    ):  # StyleID's: from the level of each label to that of the next, then 999
        order, alphas = list(range(0, TRAIN, stride)), np.maximum(alphas, ddim.MIN_ALPHA)
        for t, after in zip(order, [*order[1:], TRAIN - 1], strict=True):
            clean = (x - np.sqrt(1 - alphas[t]) * smooth(x, t)) / np.sqrt(alphas[t])
            x = np.sqrt(alphas[after]) * clean + np.sqrt(1 - alphas[after]) * smooth(x, t)
            found.append(x)
        return found
    for t in range(0, TRAIN, stride):
        prev = min(t - stride, TRAIN - 1)
        a_prev = alphas[prev] if prev >= 0 else final
        eps = smooth(x, t if labels == "paper" else max(prev, 0))
        x = np.sqrt(alphas[t]) * (x - np.sqrt(1 - a_prev) * eps) / np.sqrt(a_prev)
        x = x + np.sqrt(1 - alphas[t]) * eps
        found.append(x)
    return found


@pytest.mark.parametrize("labels", ddim.LABELS)
@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
@pytest.mark.parametrize("to_one", [False, True])
def test_inversion_is_the_papers(kind, steps, labels, to_one):
    alphas = schedule(kind)
    final = 1.0 if to_one else alphas[0]
    x = np.random.default_rng(0).normal(size=(1, 4, 3, 5))
    plan = ddim.inversion_plan(range(0, TRAIN, TRAIN // steps), alphas, final, labels)
    start = torch.from_numpy(x)
    found = [start, *ddim.run(start, plan, lambda x, t: smooth(x, t))]
    expected = numpy_inversion(x, steps, alphas, final, labels)
    assert len(found) == len(expected) == steps + 1
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-12)
    if not to_one and labels != "style_id":
        torch.testing.assert_close(found[1], found[0], rtol=1e-14, atol=1e-14)  # t = 0: identity


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_move_is_that_of_diffusers(kind, to_one):
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    options = {"clip_sample": False, "set_alpha_to_one": to_one, "prediction_type": kind}
    inverse = diffusers.DDIMInverseScheduler(**betas, **options)
    inverse.set_timesteps(20)
    alphas = inverse.alphas_cumprod.double().tolist()
    final = float(inverse.initial_alpha_cumprod)
    plan = ddim.inversion_plan(inverse.timesteps.tolist(), alphas, final)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in plan:
        if kind == "sample" and step.source == 1.0:
            continue  # diffusers divides by zero here
        output = torch.tanh(x) * 0.8
        theirs = inverse.step(output, step.label, x).prev_sample
        ours = ddim.move(x, ddim.to_epsilon(output, x, step.source, kind), step.source, step.target)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
        x = theirs


def test_prediction_types_agree():
    """All three ways to name one (x0, ε) give back its ε."""
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    for alpha in (0.999, 0.5, 2.0**-24):
        a, b = alpha**0.5, (1 - alpha) ** 0.5
        x = a * clean + b * noise
        outputs = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - b * clean}
        for kind, output in outputs.items():
            found = ddim.to_epsilon(output, x, alpha, kind)
            torch.testing.assert_close(found, noise, rtol=1e-9, atol=1e-9)


def test_sampling_undoes_the_inversion_as_steps_grow():
    alphas = schedule()
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    errors = {}
    for labels in ("paper", "consistent"):
        for steps in (25, 100, 500):
            order = list(range(0, TRAIN, TRAIN // steps))
            noisy = list(ddim.run(x, ddim.inversion_plan(order, alphas, 1.0, labels), smooth))[-1]
            plan = ddim.sampling_plan(order[::-1], alphas, 1.0)
            back = list(ddim.run(noisy, plan, smooth))[-1]
            errors[labels, steps] = ddim.relative_error(back, x)
    for labels in ("paper", "consistent"):
        assert errors[labels, 500] < errors[labels, 100] < errors[labels, 25]
    assert errors["paper", 500] < 0.01


def test_levels_floor_a_schedule_without_signal():
    assert ddim.levels([1, 0], [0.9, 0.0], 1.0) == [ddim.MIN_ALPHA, 0.9, 1.0]


@pytest.mark.parametrize(
    ("timesteps", "labels", "message"),
    [
        ([], "paper", "ascend"),
        ([0, 0], "paper", "ascend"),
        ([20, 0], "paper", "ascend"),
        ([0, TRAIN], "paper", "0..999"),
        ([-1, 5], "paper", "0..999"),
        ([0, 5], "papers", "unknown labels"),
    ],
)
def test_a_plan_without_meaning(timesteps, labels, message):
    with pytest.raises(ValueError, match=message):
        ddim.inversion_plan(timesteps, schedule(), 1.0, labels)


def test_outputs_without_meaning():
    x = torch.ones(2)
    with pytest.raises(ValueError, match="unknown prediction_type"):
        ddim.to_epsilon(x, x, 0.5, "flow")
    with pytest.raises(ValueError, match="nothing about the noise"):
        ddim.to_epsilon(x, x, 1.0, "sample")


def test_relative_error():
    assert ddim.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0.0
    assert ddim.relative_error(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])) == 1.0
    assert ddim.relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
