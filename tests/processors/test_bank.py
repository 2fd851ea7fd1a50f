"""Banks: the reference's rows come and go inside the UNet call, and give what a row in the batch
gives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import random_pipelines as tiny
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from styleattn.inversion import FileRefused, Trajectory, ddim_sample
from styleattn.methods import StyleAligned
from styleattn.processors import apply, paused
from styleattn.processors.bank import build_bank, reference_callback
from styleattn.references import Reference, StyleBank, weight_at, weight_tensor

STEPS = 3
STYLE = StyleAligned(shared_score_shift=math.log(2))
PROMPT = "a toy train"


@pytest.fixture(scope="module")
def trajectory(pipe):
    return ddim_sample(pipe, PROMPT, num_inference_steps=STEPS, guidance_scale=3.0)


@pytest.fixture(scope="module")
def bank(pipe, trajectory):
    return build_bank(pipe, Reference(latents=trajectory), STYLE)


def in_batch(pipe, run, trajectory, offset, noise, prompts, **arguments):
    """The official form: the reference is row 0 of the user's own batch."""
    keep = reference_callback(trajectory, offset=offset)
    with_reference = keep.initial(torch.cat([noise[:1], noise]))
    return run(
        pipe,
        [PROMPT, *prompts],
        noise=with_reference,
        steps=STEPS,
        callback_on_step_end=keep,
        **arguments,
    )


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_bank_rows_are_rows_of_the_batch(
    pipe, run, distance, trajectory, bank, offset, guidance_scale
):
    prompts, noise = ["a cat", "a house", "a ship"], run.noise(pipe, 3)
    options = {"guidance_scale": guidance_scale}
    with apply(pipe, STYLE):
        expected = in_batch(pipe, run, trajectory, offset, noise, prompts, **options)
    with apply(pipe, STYLE, bank=bank.with_offset(offset)):
        out = run(pipe, prompts, noise=noise, steps=STEPS, **options)
    assert distance(out, expected[1:]) <= 1e-5
    assert distance(expected[:1], trajectory.latents[-1:]) == 0.0
    plain = run(pipe, prompts, noise=noise, steps=STEPS, **options)
    assert distance(out, plain) > 1e-3


def test_any_batch_gives_the_same_pictures(pipe, run, distance, bank):
    noise = run.noise(pipe, 4)
    with apply(pipe, STYLE, bank=bank):
        whole = run(pipe, ["a cat", "a house"], noise=noise, steps=STEPS, num_images_per_prompt=2)
        for row, prompt in ((0, "a cat"), (3, "a house")):
            one = run(pipe, [prompt], noise=noise[[row]], steps=STEPS)
            assert distance(one, whole[[row]]) <= 1e-5


def test_sigma_schedulers_see_the_same_reference(run, distance):
    """Euler scales its latents; the bank is at the scale that the UNet sees, so both forms
    agree."""
    pipe = tiny.sdxl()
    pipe.scheduler = EulerDiscreteScheduler(**tiny.BETAS, timestep_spacing="leading")
    trajectory = ddim_sample(pipe, PROMPT, num_inference_steps=STEPS)
    bank = build_bank(pipe, Reference(latents=trajectory), STYLE)
    prompts, noise = ["a cat"], run.noise(pipe, 1)
    with apply(pipe, STYLE):
        expected = in_batch(pipe, run, trajectory, 0, noise, prompts)
    with apply(pipe, STYLE, bank=bank):
        out = run(pipe, prompts, noise=noise, steps=STEPS)
    assert distance(out, expected[1:]) <= 1e-5


def test_other_step_counts_take_the_nearest_label(pipe, run, bank):
    with apply(pipe, STYLE, bank=bank):
        assert torch.isfinite(run(pipe, ["a cat"], steps=5)).all()


def test_two_references(pipe, run, distance, trajectory):
    """The same reference twice at half weight is the reference once."""
    other = ddim_sample(pipe, "a ship", seed=3, num_inference_steps=STEPS)
    halves = [Reference(latents=trajectory, weight=0.5)] * 2
    once = build_bank(pipe, Reference(latents=trajectory), STYLE)
    twice = build_bank(pipe, halves, STYLE)
    mixed = build_bank(pipe, [halves[0], dataclasses.replace(halves[0], latents=other)], STYLE)
    method = StyleAligned(share_group_norm=False)
    out = []
    for bank in (once, twice, mixed):
        with apply(pipe, method, bank=bank):
            out.append(run(pipe, ["a cat"], steps=STEPS))
    assert distance(out[1], out[0]) <= 1e-5
    assert distance(out[2], out[0]) > 1e-4
    only_first = (Reference(), Reference(weight=0.0))
    with apply(pipe, StyleAligned(share_group_norm=False, references=only_first), bank=mixed):
        assert distance(run(pipe, ["a cat"], steps=STEPS), out[0]) <= 1e-5


def test_a_picture_is_inverted(pipe, run):
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    with apply(pipe, STYLE):  # a style at work rests while the bank is made
        bank = build_bank(
            pipe, Reference(image=picture, prompt="noise"), STYLE, num_inference_steps=STEPS
        )
    again = build_bank(
        pipe, [Reference(image=picture, prompt="noise")], STYLE, num_inference_steps=STEPS
    )
    assert bank.offset == min(5, STEPS - 1)
    assert torch.equal(bank.latents, again.latents)
    assert bank.fingerprint == again.fingerprint
    assert len(bank.fingerprint) == 64
    louder = dataclasses.replace(STYLE, shared_score_shift=0.0)
    other = build_bank(
        pipe, Reference(image=picture, prompt="noise"), louder, num_inference_steps=STEPS
    )
    assert other.fingerprint != bank.fingerprint
    with apply(pipe, STYLE, bank=bank):
        assert torch.isfinite(run(pipe, ["a cat"], steps=STEPS)).all()


def test_prompts_alone_are_sampled_with_their_seeds(pipe):
    banks = [
        build_bank(pipe, Reference(prompt=PROMPT), STYLE, num_inference_steps=2, seed=s)
        for s in (0, 0, 1)
    ]
    assert torch.equal(banks[0].latents, banks[1].latents)
    assert not torch.equal(banks[0].latents, banks[2].latents)
    assert banks[0].offset == 0


def test_save_and_load(bank, tmp_path):
    mask = torch.rand(4, 4)
    reference = Reference(prompt="x", weight=0.5, mask=mask, layers={"mid": 1.0}, steps=(0.0, 0.5))
    saved = dataclasses.replace(bank, references=(reference,), offset=1, metadata={"a": [1]})
    path = tmp_path / "bank.safetensors"
    saved.save(path)
    loaded = StyleBank.load(path)
    assert loaded.references[0].to_dict() == reference.to_dict()
    assert torch.equal(loaded.references[0].mask, mask)
    assert torch.equal(loaded.inputs, saved.inputs)
    assert (loaded.offset, loaded.fingerprint) == (1, bank.fingerprint)
    assert loaded.metadata == {"a": [1]}
    assert loaded.nbytes == saved.nbytes > loaded.latents.numel() * 4
    data = path.read_bytes()
    for broken in (data[:100], data[: len(data) // 2], b"", b"not a bank" * 20):
        path.write_bytes(broken)
        with pytest.raises(FileRefused, match="bank"):
            StyleBank.load(path)
    with pytest.raises(FileNotFoundError):
        StyleBank.load(tmp_path / "none")


def test_offset_holds_the_first_steps():
    told = {n: torch.zeros(1, 2, 3) for n in ("prompt_embeds", "negative_prompt_embeds")}
    latents = torch.arange(9.0).view(1, 9, 1, 1, 1)
    bank = StyleBank(latents, torch.arange(800, 0, -100), told)
    shown = {o: bank.with_offset(o).inputs.flatten().tolist() for o in (0, 1, 5)}
    assert shown == {0: [0, 1, 2, 3, 4, 5, 6, 7], 1: [1, 2, 2, 3, 4, 5, 6, 7], 5: [5, *[6] * 6, 7]}


GOOD = {
    "latents": torch.zeros(1, 3, 4, 8, 8),
    "timesteps": torch.tensor([500, 0]),
    "conditions": {n: torch.zeros(1, 2, 3) for n in ("prompt_embeds", "negative_prompt_embeds")},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latents": torch.zeros(1, 2, 4, 8, 8)}, "need"),
        ({"latents": torch.full((1, 3, 4, 8, 8), math.nan)}, "not finite"),
        ({"timesteps": torch.tensor([0, 500])}, "descend"),
        ({"conditions": {}}, "lack prompt_embeds"),
        ({"conditions": {**GOOD["conditions"], "color": torch.zeros(1)}}, "unknown condition"),
        (
            {"conditions": {**GOOD["conditions"], "time_ids": torch.zeros(2, 6)}},
            "start with 1 rows",
        ),
        ({"references": (Reference(), Reference())}, "2 references"),
        ({"offset": 2}, "offset must be"),
        ({"offset": True}, "offset must be"),
    ],
)
def test_bad_banks(changes, says):
    with pytest.raises(ValueError, match="StyleBank") as error:
        StyleBank(**{**GOOD, **changes})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight": -1}, "not negative"),
        ({"weight": math.inf}, "finite"),
        ({"weight": "much"}, "must be a number"),
        ({"prompt": None}, "must be a string"),
        ({"image": "a", "latents": "b"}, "not both"),
        ({"mask": torch.zeros(3)}, "tensor \\[h, w\\]"),
        ({"mask": "left"}, "tensor \\[h, w\\]"),
        ({"mask": torch.full((2, 2), 1.5)}, "lie in \\[0, 1\\]"),
        ({"steps": 3}, "Reference.steps"),
    ],
)
def test_bad_references(settings, says):
    with pytest.raises(ValueError, match=says):
        Reference(**settings)


@pytest.mark.parametrize(
    ("act", "kind", "says"),
    [
        (lambda p, t: build_bank(p, [], STYLE), TypeError, "one Reference or several"),
        (lambda p, t: build_bank(p, "a.png", STYLE), TypeError, "one Reference or several"),
        (lambda p, t: build_bank(p, Reference(), StyleAligned), TypeError, "needs a method"),
        (lambda p, t: build_bank(p.unet, Reference(), STYLE), TypeError, "build_bank"),
        (lambda p, t: build_bank(p, Reference(layers="no*"), STYLE), ValueError, "no\\*"),
        (
            lambda p, t: build_bank(
                p, [Reference(latents=t), Reference()], STYLE, num_inference_steps=2
            ),
            ValueError,
            "share timesteps and size",
        ),
        (lambda p, t: reference_callback(t, offset=STEPS), ValueError, "offset must be"),
    ],
)
def test_bad_requests(pipe, trajectory, act, kind, says):
    with pytest.raises(kind, match=says):
        act(pipe, trajectory)


def test_it_prints_in_a_few_lines(bank):
    assert len(repr(bank)) < 2000 and "fingerprint" in repr(bank)


def test_trajectories_of_other_schedulers_are_refused(pipe, trajectory):
    shifted = dataclasses.replace(trajectory, timesteps=trajectory.timesteps + 1)
    assert isinstance(shifted, Trajectory)
    with pytest.raises(ValueError, match="another scheduler"):
        build_bank(pipe, Reference(latents=shifted), STYLE)


def test_calls_that_do_not_fit_the_bank(pipe, run, bank):
    with apply(pipe, STYLE, bank=bank):
        with pytest.raises(ValueError, match="does not fit this call: its latents are"):
            pipe(["a"], height=48, width=48, num_inference_steps=1, output_type="latent")
        with paused(pipe):
            pipe(["a"], height=48, width=48, num_inference_steps=1, output_type="latent")
        run(pipe, ["a"], steps=1)


@pytest.mark.parametrize("control_reference", [False, True])
def test_controlnet_and_bank(run, distance, control_reference):
    pipe = tiny.sdxl_controlnet()
    plain = StableDiffusionXLPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    trajectory = ddim_sample(plain, PROMPT, num_inference_steps=STEPS)
    bank = build_bank(plain, Reference(latents=trajectory), STYLE)
    control = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method = StyleAligned(control_reference=control_reference)
    noise, prompts = run.noise(pipe, 2), ["a cat", "a house"]
    with apply(pipe, method):
        with_reference = torch.cat([control[:1], control])
        expected = in_batch(pipe, run, trajectory, 0, noise, prompts, image=with_reference)
    with apply(pipe, method, bank=bank):
        out = run(pipe, prompts, noise=noise, steps=STEPS, image=control)
    limit = 1e-5 if not control_reference else 1.0  # a bank has no control picture of its own
    assert distance(out, expected[1:]) <= limit


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        ((0.0, 1.0), 4, [1, 1, 1, 1]),
        ((0.0, 0.5), 4, [1, 1, 0, 0]),
        ((0.3, 0.6), 10, [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
        ((0.5, 0.5), 4, [0, 0, 0, 0]),
        ((1.0, 0.5, 0.25, 0.0), 4, [1, 0.5, 0.25, 0]),
        ((1.0, 0.5, 0.0), 6, [1, 1, 0.5, 0.5, 0, 0]),
    ],
)
def test_schedules_over_steps(steps, count, expected):
    assert [weight_at(steps, i / count) for i in range(count)] == expected
    assert [float(weight_tensor(steps, torch.tensor(i / count))) for i in range(count)] == expected


def test_masks_restrict_a_reference_to_a_region(pipe, run, distance, bank):
    """A mask of ones is no mask, one of zeros leaves AdaIN only; half a mask lies between."""
    method = StyleAligned(share_group_norm=False, adain_queries=False, adain_keys=False)

    def with_mask(mask):
        masked = bank.with_references([Reference(mask=mask)])
        with apply(pipe, method, bank=masked):
            return run(pipe, ["a cat"], steps=1)

    plain = run(pipe, ["a cat"], steps=1)
    ones, zeros, half = torch.ones(16, 16), torch.zeros(16, 16), torch.zeros(16, 16)
    half[:, :8] = 1.0
    with apply(pipe, method, bank=bank):
        whole = run(pipe, ["a cat"], steps=1)
    assert distance(with_mask(ones), whole) <= 1e-6
    assert distance(with_mask(zeros), plain) <= 1e-6
    assert distance(with_mask(half), plain) > 0
    assert distance(with_mask(half), whole) > 0
