"""A whole recipe from Python gives what the command line gives."""

from __future__ import annotations

from math import log

import image_prompts as images
import pytest
import random_flux
from PIL import Image

from styleattn import cli
from styleattn.methods import AlignedGen, EasyControl, PuLIDFLUX, StyleAligned, StyleID
from styleattn.pipelines import Sampling, load_model, styled_pictures
from styleattn.processors.bank import build_bank
from styleattn.references import Reference


@pytest.fixture(scope="module")
def place(hosts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    hosts.sd().save_pretrained(folder / "sd")
    random_flux.flux().save_pretrained(folder / "flux")
    for i in (0, 1):
        images.picture(i, (32, 32)).save(folder / f"{i}.png")
    (folder / "prompts.txt").write_text("a cat\na house\n")
    return folder


CASES = [
    ("sd", StyleID(), False, 1.0),
    ("sd", StyleAligned(shared_score_shift=log(2)), True, 10.0),
    ("flux", AlignedGen(), True, 3.5),
]


@pytest.mark.parametrize(("model", "method", "prompted", "guidance"), CASES)
def test_same_pictures_as_the_command_line(place, tmp_path, model, method, prompted, guidance):
    content, reference = str(place / "0.png"), place / "1.png"
    argv = [
        "stylize",
        "--model",
        str(place / model),
        "--method",
        method.name,
        "--out",
        str(tmp_path),
    ]
    argv += ["--prompts", str(place / "prompts.txt")] if prompted else ["--content", content]
    argv += ["--reference", str(reference), "--steps", "6", "--height", "16", "--width", "16"]
    assert cli.main([*argv, "--device", "cpu", "--seed", "3"]) == 0
    expected = [Image.open(path).convert("RGB") for path in sorted(tmp_path.glob("0*.png"))]
    found = styled_pictures(
        load_model(str(place / model), device="cpu"),
        method,
        ["a cat", "a house"] if prompted else "",
        reference=reference,
        content=() if prompted else content,
        sampling=Sampling(6, guidance, height=16, width=16),
        seed=3,
    )
    assert len(found) == len(expected) == (2 if prompted else 1)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tobytes() == theirs.tobytes()


def test_what_is_missing_is_said_before_work(place, hosts):
    pipe = hosts.sd()
    with pytest.raises(ValueError, match="content picture"):
        styled_pictures(pipe, StyleID(), reference=place / "1.png")
    with pytest.raises(ValueError, match="no reference"):
        styled_pictures(pipe, StyleID(), content=place / "1.png")
    with pytest.raises(ValueError, match="no recipe"):
        styled_pictures(pipe, AlignedGen(), "a cat", reference=place / "1.png")


def test_one_prompt_for_several_contents(place, hosts):
    contents = [place / "0.png", place / "1.png"]
    size = Sampling(4, 1.0, height=16, width=16)
    pipe = hosts.sd(scheduler=hosts.ddim(steps_offset=1))
    found = styled_pictures(pipe, StyleID(), reference=contents[0], content=contents, sampling=size)
    assert len(found) == 2
    assert found[0].tobytes() != found[1].tobytes()


def test_schnell_is_not_guided(place):
    """Four steps without a scale, which such models refuse."""
    pipe = random_flux.flux(guidance_embeds=False)
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(kwargs["guidance"]), with_kwargs=True
    )
    calls = []
    method = EasyControl(offset=(0.0, 0.0))
    assert len(styled_pictures(pipe, method, "a cat", reference=place / "0.png")) == 1
    assert calls == [None] * 4


def test_nothing_that_is_given_is_left_out(place):
    pipe, picture = random_flux.flux(), place / "0.png"
    sampling = Sampling(2, height=16, width=16)
    options = {"num_inference_steps": 2, "height": 16, "width": 16}
    bank = build_bank(pipe, Reference(prompt="a cat"), AlignedGen(), **options)
    shown = EasyControl(references=(Reference(image=picture),))
    wrong = [
        (AlignedGen(), {"bank": bank}, ValueError, "one or the other"),
        (shown, {}, ValueError, "has references of its own"),
        (shown, {"bank": bank, "reference": ()}, ValueError, "takes no bank"),
        (PuLIDFLUX(), {}, ValueError, "takes no reference picture"),
        ("aligned_gen", {}, TypeError, "takes a method such as"),
        (AlignedGen, {}, TypeError, "takes a method such as"),
    ]
    for method, more, error, words in wrong:
        given = {"reference": picture, "sampling": sampling, **more}
        with pytest.raises(error, match=words):
            styled_pictures(pipe, method, "a cat", **given)


def test_features_are_kept_for_further_calls(place, tmp_path, hosts):
    pipe = hosts.sd(scheduler=hosts.ddim(steps_offset=1))
    given = {
        "reference": place / "1.png",
        "content": place / "0.png",
        "sampling": Sampling(4, 1.0, height=16, width=16),
        "features": tmp_path,
    }
    first = styled_pictures(pipe, StyleID(), **given)
    kept = sorted(file.name for file in tmp_path.rglob("*") if file.is_file())
    again = styled_pictures(pipe, StyleID(), **given)
    assert kept == sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) != []
    assert first[0].tobytes() == again[0].tobytes()
    with pytest.raises(ValueError, match="keeps no features on UNets"):
        styled_pictures(pipe, StyleAligned(), "a cat", reference=place / "1.png", features=tmp_path)


def test_scales_of_a_controlnet_have_a_meaning(place, hosts):
    pipe = hosts.sd()
    pipe.controlnet = object()
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="control_scale must be finite and >= 0"):
            styled_pictures(
                pipe, StyleID(), reference=place / "1.png", content=place / "0.png",
                control_scale=scale,
            )  # fmt: skip
