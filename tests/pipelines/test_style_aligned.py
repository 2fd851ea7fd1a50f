"""Transfer: the bank's way against the official way, batches, control pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import styleattn
from styleattn.inversion import ddim_invert, encode_prompts
from styleattn.methods import StyleAligned
from styleattn.pipelines import (
    TRANSFER,
    Inversion,
    Sampling,
    controlled,
    generate,
    make_bank,
    make_trajectory,
    transfer,
)
from styleattn.pipelines.sampling import batches

STEPS = 6
PROMPTS = ["a cat", "a dog", "a hen"]
SAMPLING = Sampling(STEPS, 3.0)


@pytest.fixture(scope="module")
def pipe(hosts):
    return hosts.sdxl()


@pytest.fixture(scope="module")
def control_pipe(hosts):
    return hosts.sdxl_controlnet()


@pytest.fixture
def trajectory(pipe, picture):
    return make_trajectory(pipe, picture, "a train", SAMPLING, Inversion())


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


def official_transfer(pipe, trajectory, prompts, offset, method):
    """Row 0 starts as zts[offset] and becomes zts[max(offset + 1, i + 1)] after step i."""
    zts = trajectory.latents
    everything = [trajectory.prompt, *prompts]
    embeds = encode_prompts(pipe, everything)
    noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    latents = torch.stack([zts[offset], *noise])

    def overwrite(host, i, t, tensors):
        tensors["latents"][0] = zts[max(offset + 1, i + 1)]
        return tensors

    with styleattn.apply(pipe, method):
        return pipe(
            **embeds.arguments(),
            latents=latents,
            num_inference_steps=STEPS,
            guidance_scale=SAMPLING.guidance_scale,
            callback_on_step_end=overwrite,
        ).images[1:]


@pytest.mark.parametrize("offset", [0, 5])
def test_transfer_is_the_official_one(pipe, trajectory, offset):
    inversion = Inversion(offset=offset)
    ours = transfer(pipe, trajectory, PROMPTS, sampling=SAMPLING, inversion=inversion)
    theirs = official_transfer(pipe, trajectory, PROMPTS, offset, TRANSFER)
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    plain = generate(pipe, PROMPTS, [0, 1, 2], SAMPLING)
    assert np.abs(pixels(ours) - pixels(plain)).max() > 3


def test_the_papers_offset_goes_with_the_papers_labels(pipe, picture, trajectory):
    paper = make_bank(pipe, trajectory)
    consistent = make_trajectory(pipe, picture, "", SAMPLING, Inversion(labels="consistent"))
    sampled = make_trajectory(pipe, None, "a train", SAMPLING, Inversion())
    found = [make_bank(pipe, t).offset for t in (trajectory, consistent, sampled)]
    assert found == [5, 0, 0] and paper.offset == 5


def test_batches_change_rounding_only(pipe, trajectory):
    whole = transfer(pipe, trajectory, PROMPTS, sampling=SAMPLING, batch_size=3)
    single = transfer(pipe, trajectory, PROMPTS, sampling=SAMPLING, batch_size=1)
    again = transfer(pipe, trajectory, PROMPTS, sampling=SAMPLING, batch_size=3)
    assert np.array_equal(pixels(whole), pixels(again))
    assert np.abs(pixels(whole) - pixels(single)).max() <= 1


def test_every_kind_of_reference(pipe, picture, trajectory):
    settings = {"sampling": SAMPLING, "reference_prompt": "a train"}
    expected = pixels(transfer(pipe, trajectory, PROMPTS[:1], sampling=SAMPLING))
    bank = make_bank(pipe, trajectory)
    for reference in (picture, trajectory.latents[-1], bank):
        assert np.array_equal(pixels(transfer(pipe, reference, PROMPTS[:1], **settings)), expected)
    made = transfer(pipe, None, PROMPTS[:1], **settings)
    assert not np.array_equal(pixels(made), expected)


def test_the_pipeline_is_given_back(pipe, trajectory):
    before = dict(pipe.unet.attn_processors)
    transfer(pipe, trajectory, PROMPTS[:1], sampling=SAMPLING)
    assert pipe.unet.attn_processors == before
    assert pipe._progress_bar_config == {"disable": True}
    with pytest.raises(RuntimeError, match="enough"):
        transfer(pipe, trajectory, PROMPTS[:1], sampling=SAMPLING, callback=stop_at_two)
    assert pipe.unet.attn_processors == before


def stop_at_two(done: int, total: int) -> None:
    if done == 2:
        raise RuntimeError("enough")


def test_a_styled_pipeline_is_inverted_without_its_style(pipe, picture, trajectory):
    with styleattn.apply(pipe, StyleAligned()):
        found = make_trajectory(pipe, picture, "a train", SAMPLING, Inversion())
    assert torch.equal(found.latents, trajectory.latents)


def test_guidance_off_and_other_schedulers(hosts, picture):
    from diffusers import EulerDiscreteScheduler

    for scheduler in (hosts.ddim(), EulerDiscreteScheduler(**hosts.BETAS, steps_offset=1)):
        pipe = hosts.sdxl(scheduler)
        for guidance in (1.0, 3.0):
            sampling = Sampling(4, guidance)
            images = transfer(pipe, picture, PROMPTS[:2], sampling=sampling)
            assert len(images) == 2
            plain = generate(pipe, PROMPTS[:2], [0, 1], sampling)
            assert not np.array_equal(pixels(images), pixels(plain))


def test_sizes_and_negative_prompts(pipe, picture):
    sampling = Sampling(3, 3.0, "ugly", height=24, width=40)
    images = transfer(pipe, picture, PROMPTS[:1], sampling=sampling)
    assert images[0].size == (40, 24)
    other = transfer(pipe, picture, PROMPTS[:1], sampling=Sampling(3, 3.0, height=24, width=40))
    assert not np.array_equal(pixels(images), pixels(other))


def test_sd(hosts, picture):
    pipe = hosts.sd()
    assert len(transfer(pipe, picture, PROMPTS, sampling=Sampling(3, 3.0), batch_size=2)) == 3


FEW = PROMPTS[:2]


def controls(count: int) -> list[Image.Image]:
    random = np.random.default_rng(5)
    return [
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(count)
    ]


def test_control_off_the_reference(control_pipe, picture):
    """The official ControlNet variant: residuals on the images, none on the reference."""
    trajectory = make_trajectory(control_pipe, picture, "a train", SAMPLING, Inversion())
    pictures = controls(3)
    settings = {"sampling": SAMPLING, "inversion": Inversion(offset=0)}
    call = {"controlnet_conditioning_scale": 0.8}
    ours = transfer(
        control_pipe, trajectory, FEW, control=pictures[1:], batch_size=1, **settings, **call
    )
    # the same by hand: reference in the batch, its control picture without effect
    for first in (pictures[0], Image.new("RGB", (32, 32))):
        by_hand = controlled(
            control_pipe,
            trajectory,
            first,
            FEW,
            pictures[1:],
            method=StyleAligned(shared_score_shift=TRANSFER.shared_score_shift),
            sampling=SAMPLING,
            **call,
        )
        assert np.abs(pixels(ours) - pixels(by_hand)).max() <= 1
    loose = transfer(control_pipe, trajectory, FEW, control=pictures[:2], **settings, **call)
    assert not np.array_equal(pixels(ours), pixels(loose))


def test_control_on_the_reference(control_pipe, picture):
    trajectory = make_trajectory(control_pipe, picture, "a train", SAMPLING, Inversion())
    pictures = controls(3)
    found = [
        controlled(control_pipe, trajectory, first, FEW, pictures[1:], sampling=SAMPLING)
        for first in (pictures[0], Image.new("RGB", (32, 32)))
    ]
    assert not np.array_equal(pixels(found[0]), pixels(found[1]))
    smaller = controlled(
        control_pipe,
        trajectory,
        pictures[0],
        FEW,
        pictures[1:],
        sampling=SAMPLING,
        batch_size=1,
    )
    assert np.abs(pixels(found[0]) - pixels(smaller)).max() <= 1


def test_controlled_needs_plain_latents(hosts, picture):
    from diffusers import EulerDiscreteScheduler

    pipe = hosts.sdxl_controlnet(EulerDiscreteScheduler(**hosts.BETAS))
    trajectory = ddim_invert(pipe, picture, "", num_inference_steps=2)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler scales its latents"):
        controlled(pipe, trajectory, picture, ["a"], [picture])


def test_inputs_without_meaning(pipe, trajectory):
    with pytest.raises(ValueError, match="no prompts"):
        transfer(pipe, trajectory, [])
    with pytest.raises(ValueError, match="batch_size"):
        transfer(pipe, trajectory, PROMPTS, batch_size=0)
    with pytest.raises(ValueError, match="3 prompts need as many control pictures, got 1"):
        transfer(pipe, trajectory, PROMPTS, control=controls(1))
    with pytest.raises(ValueError, match="num_inference_steps"):
        Sampling(0)
    with pytest.raises(ValueError, match="guidance_scale"):
        Sampling(5, float("nan"))


def test_batches():
    assert [list(b) for b in batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert batches(0, 2) == []


def test_arguments_reach_the_pipeline(pipe, trajectory):
    with pytest.raises(TypeError, match="no_such_argument"):
        transfer(pipe, trajectory, PROMPTS, sampling=SAMPLING, no_such_argument=1)
