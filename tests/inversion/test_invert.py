"""DDIM through real (random) pipelines: prompts, guidance, schedules, checkpoints, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from styleattn.inversion import (
    FileRefused,
    HostUnsupported,
    Stopped,
    ddim_invert,
    ddim_sample,
    encode_picture,
    encode_prompts,
    fingerprint,
    read_picture,
    round_trip_error,
)

STEPS = 5


@pytest.fixture(scope="module")
def sdxl(hosts):
    return hosts.sdxl()


@pytest.fixture(scope="module")
def sd(hosts):
    pipe = hosts.sd()
    pipe.scheduler = hosts.ddim()  # the pipeline's constructor had set steps_offset to 1
    return pipe


def written_out(pipe, clean, prompt, steps, guidance, conditions):
    """The official transfer's inversion, with the UNet called by hand."""
    alphas = pipe.scheduler.alphas_cumprod.double().numpy()
    embeds, added = conditions
    x = clean
    found = [x]
    stride = 1000 // steps
    for t in range(0, 1000, stride):
        prev = t - stride
        a_prev = alphas[prev] if prev >= 0 else float(pipe.scheduler.final_alpha_cumprod)
        with torch.no_grad():
            out = pipe.unet(
                torch.cat([x, x]), t, encoder_hidden_states=embeds, added_cond_kwargs=added
            ).sample
        uncond, cond = out.chunk(2)
        eps = uncond + guidance * (cond - uncond)
        x = np.sqrt(alphas[t]) * (x - np.sqrt(1 - a_prev) * eps) / np.sqrt(a_prev)
        x = (x + np.sqrt(1 - alphas[t]) * eps).float()
        found.append(x)
    return torch.cat(found[::-1])


def test_sdxl_is_the_official_inversion(sdxl, picture):
    found = ddim_invert(sdxl, picture, "a train", num_inference_steps=STEPS)
    cond, _, pooled, _ = sdxl.encode_prompt("a train", device="cpu", num_images_per_prompt=1)
    embeds = torch.cat([torch.zeros_like(cond), cond])  # force_zeros_for_empty_prompt
    ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    added = {"text_embeds": torch.cat([torch.zeros_like(pooled), pooled]), "time_ids": ids}
    clean = found.latents[-1:]
    expected = written_out(sdxl, clean, "a train", STEPS, 2.0, (embeds, added))
    torch.testing.assert_close(found.latents, expected, rtol=1e-4, atol=1e-4)
    assert found.timesteps.tolist() == [800, 600, 400, 200, 0]
    torch.testing.assert_close(found.latents[-1], found.latents[-2])  # the first step: identity
    assert (found.height, found.width, found.method) == (32, 32, "ddim")


def test_sd_uses_the_empty_prompt(sd, picture):
    found = ddim_invert(sd, picture, "a train", num_inference_steps=STEPS, guidance_scale=3.0)
    cond, uncond = sd.encode_prompt("a train", "cpu", 1, True)
    assert uncond.abs().max() > 0
    clean = found.latents[-1:]
    conditions = (torch.cat([uncond, cond]), None)
    expected = written_out(sd, clean, "a train", STEPS, 3.0, conditions)
    torch.testing.assert_close(found.latents, expected, rtol=1e-4, atol=1e-4)


def test_agrees_with_diffusers_inverse_scheduler(sd, picture):
    from diffusers import DDIMInverseScheduler

    found = ddim_invert(sd, picture, "", num_inference_steps=STEPS, guidance_scale=1.0)
    inverse = DDIMInverseScheduler.from_config(sd.scheduler.config)
    inverse.set_timesteps(STEPS)
    cond = encode_prompts(sd, [""]).embeds
    x = found.latents[-1:]
    for t in inverse.timesteps:
        with torch.no_grad():
            out = sd.unet(x, t, encoder_hidden_states=cond).sample
        x = inverse.step(out, t, x).prev_sample
    torch.testing.assert_close(found.latents[:1], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_sampling_is_that_of_the_pipeline(hosts, kind):
    """ddim_sample makes what the pipeline with its DDIM scheduler makes from the same noise."""
    pipe = hosts.sdxl(hosts.ddim(prediction_type=kind))
    found = ddim_sample(pipe, "a cat", seed=3, num_inference_steps=STEPS, guidance_scale=4.0)
    assert found.method == "sample"
    official = pipe(
        "a cat",
        latents=found.latents[:1],
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    scale = official.abs().max()
    torch.testing.assert_close(found.latents[-1:] / scale, official / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_the_pipelines_scheduler(hosts, picture, spacing):
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**hosts.BETAS, timestep_spacing=spacing, steps_offset=1)
    pipe = hosts.sdxl(scheduler)
    before = pipe.scheduler.timesteps.clone()
    found = ddim_invert(pipe, picture, "", num_inference_steps=7, guidance_scale=1.0)
    assert torch.equal(pipe.scheduler.timesteps, before)
    scheduler.set_timesteps(7)
    expected = scheduler.timesteps.round().long()
    assert torch.equal(found.timesteps, expected)
    assert found.alphas[-1] == 1.0 and found.latents.isfinite().all()


def test_zero_terminal_signal(hosts, picture):
    scheduler = hosts.ddim(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    found = ddim_invert(hosts.sd(scheduler), picture, "", num_inference_steps=4, round_trip=True)
    assert found.timesteps[0] == 999 and found.latents.isfinite().all()
    assert np.isfinite(found.round_trip_error)


def test_labels_differ_and_round_trip_is_reported(sd, picture):
    found = {}
    for labels in ("paper", "consistent"):
        found[labels] = ddim_invert(
            sd, picture, "x", num_inference_steps=STEPS, labels=labels, round_trip=True
        )
        again = round_trip_error(sd, found[labels])
        assert found[labels].round_trip_error == pytest.approx(again, rel=1e-4)
    assert not torch.equal(found["paper"].latents[0], found["consistent"].latents[0])
    assert torch.equal(found["paper"].latents[-1], found["consistent"].latents[-1])


def test_latents_in_place_of_a_picture(sd, picture):
    latents = encode_picture(sd, picture, 24, 40)
    assert latents.shape == (4, 12, 20)
    found = ddim_invert(sd, latents, "x", num_inference_steps=2)
    same = ddim_invert(sd, picture, "x", num_inference_steps=2, height=24, width=40)
    assert torch.equal(found.latents, same.latents)
    assert (found.height, found.width) == (24, 40)


def test_half_precision_vae_encodes_in_fp32(hosts, picture):
    pipe = hosts.sd()
    expected = encode_picture(pipe, picture, 32, 32)
    pipe.vae.to(torch.bfloat16)
    halved = {k: v.clone() for k, v in pipe.vae.state_dict().items()}
    found = encode_picture(pipe, picture, 32, 32)
    assert found.dtype == torch.float32 and pipe.vae.dtype == torch.bfloat16
    assert all(torch.equal(v, halved[k]) for k, v in pipe.vae.state_dict().items())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_bfloat16_unet(hosts, picture):
    pipe = hosts.sdxl().to(torch.bfloat16)
    found = ddim_invert(pipe, picture, "x", num_inference_steps=2)
    assert found.latents.dtype == torch.float32 and found.latents.isfinite().all()


def test_stop_and_resume(sdxl, picture, tmp_path):
    path = tmp_path / "inversion.safetensors"
    whole = ddim_invert(sdxl, picture, "x", num_inference_steps=STEPS)
    calls = []

    def stop(done: int, total: int) -> bool:
        calls.append((done, total))
        return done < 3

    settings = {"num_inference_steps": STEPS, "checkpoint": path}
    with pytest.raises(Stopped, match="3 of 5") as stopped:
        ddim_invert(sdxl, picture, "x", callback=stop, **settings)
    assert str(path) in str(stopped.value) and path.exists()
    seen = []
    resumed = ddim_invert(sdxl, picture, "x", callback=lambda d, t: seen.append(d), **settings)
    assert calls == [(1, 5), (2, 5), (3, 5)] and seen == [4, 5]
    assert torch.equal(resumed.latents, whole.latents)
    assert not path.exists()


def test_an_interrupt_keeps_the_checkpoint(sdxl, picture, tmp_path):
    path = tmp_path / "inversion.safetensors"

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    settings = {"num_inference_steps": STEPS, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        ddim_invert(sdxl, picture, "x", callback=interrupt, **settings)
    with pytest.raises(ValueError, match="another inversion"):
        ddim_invert(sdxl, picture, "y", **settings)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileRefused, match="not a whole"):
        ddim_invert(sdxl, picture, "x", **settings)


def test_fingerprints(hosts):
    first, second = hosts.sd().unet, hosts.sd().unet
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        next(second.parameters()).view(-1)[0] += 1
    assert fingerprint(first) != fingerprint(second)


def test_pictures_of_every_kind(tmp_path):
    see_through = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_picture(see_through).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "P", "1", "CMYK", "I;16"):
        assert read_picture(Image.new(mode, (3, 2))).mode == "RGB"
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read .*a\.png as a picture"):
        read_picture(path)
    with pytest.raises(FileNotFoundError, match="no such picture"):
        read_picture(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"labels": "official"}, "unknown labels"),
        ({"height": 33}, "multiples of 2"),
        ({"width": 0}, "multiples of 2"),
    ],
)
def test_bad_settings(sd, picture, settings, message):
    with pytest.raises(ValueError, match=message):
        ddim_invert(sd, picture, "x", **settings)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(3, 16, 16), r"must be \[4, h, w\]"),
        (torch.zeros(2, 4, 16, 16), "must be"),
        (torch.full((4, 16, 16), float("inf")), "finite"),
    ],
)
def test_bad_latents(sd, latents, message):
    with pytest.raises(ValueError, match=message):
        ddim_invert(sd, latents, "x", num_inference_steps=2)


def test_hosts_that_cannot_be_inverted(hosts, picture):
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(HostUnsupported, match=r"no unet.*no vae.*no scheduler"):
        ddim_invert(object(), picture, "x")
    pipe = hosts.sd()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(HostUnsupported, match="no alphas_cumprod"):
        ddim_invert(pipe, picture, "x")
    with pytest.raises(HostUnsupported, match="9 channels"):
        ddim_invert(hosts.sd(in_channels=9), picture, "x")


def test_a_trajectory_of_another_network(hosts, sd, picture):
    found = ddim_invert(sd, picture, "x", num_inference_steps=2)
    with pytest.raises(ValueError, match="another network"):
        round_trip_error(hosts.sdxl(), found)
