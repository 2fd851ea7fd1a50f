"""The command line, in-process: what it writes, that it resumes, and one line for every refusal."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")

from styleattn import cli
from styleattn.backends import Backends, BackendStatus
from styleattn.inversion import files

FAST = ["--steps", "3", "--guidance", "3", "--device", "cpu"]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    import random_pipelines

    folder = tmp_path_factory.mktemp("model")
    random_pipelines.sdxl().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def work(tmp_path) -> Path:
    """A folder with a picture and prompts."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "style.png")
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n# not this one\n  a dog  \na hen\n")
    return tmp_path


def stylize(model: str, work: Path, *more: str, out: str = "out") -> list[str]:
    inputs = ["--reference", str(work / "style.png"), "--prompts", str(work / "prompts.txt")]
    return ["stylize", "--model", model, *inputs, "--out", str(work / out), *FAST, *more]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must be refused."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("styleattn: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


def test_stylize(model, work, capsys):
    assert cli.main(stylize(model, work, "--batch-size", "2", "--seed", "5")) == 0
    assert "3 of 3 pictures" in capsys.readouterr().out
    names = sorted(pictures(work / "out"))
    assert names == ["0000-a-cat.png", "0001-a-dog.png", "0002-a-hen.png"]
    manifest = json.loads((work / "out" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["settings"]["seed"] == 5
    assert [entry["seed"] for entry in manifest["pictures"]] == [5, 6, 7]
    method = manifest["settings"]["method"]
    assert method["method"] == "style_aligned"
    assert method["shared_score_shift"] == pytest.approx(np.log(2))  # the paper's, for transfer
    assert (work / "out" / "contact_sheet.png").exists()


@pytest.mark.slow
def test_bit_for_bit(model, work, capsys):
    """Same seed, same bits, also in another process and after a kill; another seed, other bits."""
    assert cli.main(stylize(model, work)) == 0
    command = [sys.executable, "-m", "styleattn.cli", *stylize(model, work, out="other")]
    subprocess.run(command, check=True, capture_output=True)
    assert pictures(work / "out") == pictures(work / "other")
    assert cli.main(stylize(model, work, "--seed", "1", out="third")) == 0
    first, third = (pictures(work / name).values() for name in ("out", "third"))
    assert not set(first) & set(third)


@pytest.mark.slow
def test_resumes_after_a_kill(model, work, capsys):
    """The process dies without a word while it makes the second of three pictures."""
    argv = stylize(model, work, "--batch-size", "1")
    program = (
        "import os, signal\n"
        "from styleattn import cli\n"
        "from styleattn.pipelines import drawing as folder\n"
        "make, made = folder.generate, []\n"
        "def dies(pipe, *args, **kwargs):\n"
        "    def die(step, steps):\n"
        "        if made and step == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    pictures = make(pipe, *args, **{**kwargs, 'callback': die})\n"
        "    made.append(pictures)\n"
        "    return pictures\n"
        "folder.generate = dies\n"
        f"cli.main({argv!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    first = work / "out" / "0000-a-cat.png"
    assert sorted(pictures(work / "out")) == [first.name]
    assert not list((work / "out").glob("*.tmp"))
    written = first.stat().st_mtime_ns
    assert cli.main(argv) == 0
    assert "2 of 3 pictures made" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written
    assert cli.main(stylize(model, work, "--batch-size", "1", out="whole")) == 0
    assert pictures(work / "out") == pictures(work / "whole")


def test_an_interrupt(model, work, capsys, monkeypatch):
    import styleattn.pipelines.drawing as folder

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "generate", interrupted)
    assert cli.main(stylize(model, work)) == 130
    assert "goes on where it stopped" in capsys.readouterr().err


def test_config_and_command_line(model, work, capsys):
    config = work / "job.yaml"
    config.write_text(
        f"model: {model}\nreference: {work / 'style.png'}\nprompts: {work / 'prompts.txt'}\n"
        "steps: 2\nguidance: 4\nbatch-size: 3\nscore_scale: 0.5\n"
        "set: {adain_values: true, layers: up_blocks.0.*}\n"
    )
    argv = ["stylize", "--config", str(config), "--out", str(work / "out"), "--steps", "3"]
    assert cli.main([*argv, "--set", "only_self_level=0.25", "--score-shift", "0.1"]) == 0
    settings = json.loads((work / "out" / "manifest.json").read_text())["settings"]
    assert settings["sampling"]["num_inference_steps"] == 3
    assert settings["sampling"]["guidance_scale"] == 4.0 and settings["batch_size"] == 3
    method = settings["method"]
    assert method["adain_values"] and method["layers"] == "up_blocks.0.*"
    assert (method["shared_score_scale"], method["shared_score_shift"]) == (0.5, 0.1)
    assert method["only_self_level"] == 0.25


def test_banks(model, work, capsys):
    bank = work / "style.safetensors"
    build = ["bank", "build", "--model", model, "--reference", str(work / "style.png")]
    assert cli.main([*build, "--out", str(bank), "--steps", "3", "--check"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["timesteps"] == [3, 666, 0] and built["round_trip_error"] >= 0
    assert cli.main(["bank", "inspect", str(bank)]) == 0
    assert json.loads(capsys.readouterr().out) == built
    argv = stylize(model, work)
    where = argv.index("--reference")
    argv[where : where + 2] = ["--bank", str(bank)]
    assert cli.main(argv) == 0
    assert len(pictures(work / "out")) == 3


def test_several_references(model, work, capsys):
    Image.open(work / "style.png").rotate(90).save(work / "other.png")
    more = ["--reference", str(work / "other.png"), "--reference-prompt", "a picture"]
    weights = ["--reference-weight", "1", "--reference-weight", "0.25"]
    assert cli.main(stylize(model, work, *more, *weights)) == 0
    assert cli.main(["bank", "inspect", str(work / "out" / "reference.safetensors")]) == 0
    facts = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert [r["weight"] for r in facts["references"]] == [1.0, 0.25]
    assert [r["prompt"] for r in facts["references"]] == ["a picture"] * 2
    assert cli.main(stylize(model, work, out="one")) == 0
    assert not set(pictures(work / "one").values()) & set(pictures(work / "out").values())
    unheard = ["--reference-weight", "1", "--reference-weight", "0"]
    assert cli.main(stylize(model, work, *more[:2], *unheard, out="same")) == 0
    for path in pictures(work / "one"):
        ours, theirs = (np.asarray(Image.open(work / f / path), float) for f in ("one", "same"))
        assert (
            np.abs(ours - theirs).max() <= 1
        )  # a reference of weight 0 is as if it were not there


def test_prompts_that_are_cut_off_are_named(model, work, caplog):
    from diffusers.utils import logging

    (work / "prompts.txt").write_text("a cat " * 100)
    logging.enable_propagation()
    try:
        assert cli.main(stylize(model, work)) == 0
    finally:
        logging.disable_propagation()
    assert "truncated" in caplog.text


def test_a_reference_from_a_prompt(model, work):
    argv = stylize(model, work)
    where = argv.index("--reference")
    argv[where : where + 2] = ["--reference-prompt", "a painting"]
    assert cli.main(argv) == 0
    assert len(pictures(work / "out")) == 3


def test_other_schedulers_and_dtypes(model, work):
    assert cli.main(stylize(model, work, "--dtype", "bfloat16", "--scheduler", "pipeline")) == 0
    manifest = json.loads((work / "out" / "manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16"


def test_demo(model, work, capsys, monkeypatch):
    """The demo's layout, on a model with random weights of the embedded one's size."""
    from diffusers import StableDiffusionXLPipeline

    from styleattn import tiny

    monkeypatch.setattr(tiny, "load", lambda name: StableDiffusionXLPipeline.from_pretrained(model))
    assert cli.main(["demo", "--out", str(work / "out"), "--steps", "2", "--device", "cpu"]) == 0
    assert "demo.png in" in capsys.readouterr().out
    facts = json.loads((work / "out" / "demo.json").read_text())
    assert facts["complete"] and len(facts["references"]) == 3
    columns = 1 + len(facts["prompts"])
    sheet = Image.open(work / "out" / "demo.png")
    assert sheet.width > columns * 192 and sheet.height > 4 * 192
    first = (work / "out" / "demo.png").read_bytes()
    assert cli.main(["demo", "--out", str(work / "again"), "--steps", "2", "--device", "cpu"]) == 0
    assert (work / "again" / "demo.png").read_bytes() == first


def test_demo_draws_with_embedded_models_only(model, work, capsys):
    argv = ["demo", "--model", model, "--out", str(work / "out")]
    assert "tiny-sdxl or tiny-flux" in refused(argv, capsys)
    assert not (work / "out").exists()


@pytest.mark.slow
def test_the_embedded_model(work, capsys):
    """The main job: a picture, prompts, one command, no network, no GPU."""
    from styleattn import tiny

    try:
        tiny.path()
    except FileNotFoundError:
        pytest.skip("this installation has no embedded model")
    reference = tiny.references()[0]
    reference.image.save(work / "style.png")
    (work / "prompts.txt").write_text("\n".join(tiny.prompts()[:3]))
    argv = stylize("tiny-sdxl", work, "--steps", "6", "--reference-prompt", reference.prompt)
    found = []
    for size in ("3", "1", "2"):
        assert cli.main([*argv, "--batch-size", size, "--out", str(work / size)]) == 0
        files = sorted((work / size).glob("0*.png"))
        found.append(np.stack([np.asarray(Image.open(path), dtype=float) for path in files]))
    for other in found[1:]:  # a batch touches its pictures by rounding only
        assert np.abs(found[0] - other).max() <= 1
    assert cli.main([*argv, "--set", "share_attention=false", "--out", str(work / "less")]) == 0
    assert cli.main(["explain"]) == 0
    assert "style_aligned" in capsys.readouterr().out


def test_a_missing_embedded_model(work, capsys, monkeypatch):
    from styleattn import tiny

    monkeypatch.setattr(
        tiny, "load", lambda name: (_ for _ in ()).throw(FileNotFoundError("no weights"))
    )
    argv = ["demo", "--out", str(work / "out")]
    assert "cannot load the embedded model tiny-sdxl: no weights" in refused(argv, capsys)
    assert not (work / "out" / "demo.png").exists()


def test_methods(capsys):
    assert cli.main(["methods"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("style_aligned: ") and "--set shared_score_shift=0.0" in text
    assert "paper: Style Injection in Diffusion" in text and "command line: stylize" in text
    assert cli.main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["style_id"]["facts"]["stylize"] and found["style_id"]["gamma"] == 0.75
    facts = ("paper", "modality", "route", "needs", "weights", "shots", "hosts")
    assert all(method["facts"][fact] for method in found.values() for fact in facts)


def test_explain(model, capsys):
    argv = ["explain", "--model", model, "--device", "cpu", "--set", "share_group_norm=false"]
    assert cli.main([*argv, "--backend", "torch"]) == 0
    text = capsys.readouterr().out
    assert "attn1" in text and "torch" in text and "style_aligned" in text


def test_doctor(capsys, monkeypatch):
    import styleattn.pipelines.doctor as doctor

    monkeypatch.setattr(doctor, "_embedded", list)
    assert cli.main(["doctor", "--json"]) in (0, 1)
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["backend reference"]["state"] == checks["operation on torch"]["state"] == "ok"
    assert checks["diffusers"]["state"] == "ok" and "GiB free" in checks["disk"]["text"]

    def broken() -> list[doctor.Check]:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(doctor, "_EXAMINERS", (("devices", broken),))
    assert cli.main(["doctor"]) == 1
    assert "broken  devices: RuntimeError: no such luck" in capsys.readouterr().out


def test_help(capsys):
    for argv in (["--help"], ["stylize", "--help"], ["bank", "--help"], ["demo", "--help"]):
        assert cli.main(argv) == 0
        assert "Usage" in capsys.readouterr().out


BAD = [
    (["--reference", "{work}/no.png"], "no such picture"),
    (["--reference", "{work}/prompts.txt"], "cannot read"),
    (["--reference", "{work}/cut.png"], "cannot read"),
    (["--reference", "{work}"], "cannot read"),
    (["--prompts", "{work}/no.txt"], "No such file"),
    (["--prompts", "{work}/empty.txt"], "no prompts"),
    (["--prompts", "{work}/style.png"], "not a UTF-8 text file"),
    (["--prompts", "{work}"], "directory"),
    (["--model", "{work}/no-model"], "does not exist"),
    (["--model", "{work}/style.png"], "is a file"),
    (["--model", "{work}"], "no model_index.json"),
    (["--method", "style_unaligned"], "unknown method 'style_unaligned'; there are style_aligned"),
    (["--set", "shared_score_shfit=1"], "shared_score_shfit"),
    (["--set", "adain_keys"], "knob=value"),
    (["--set", "adain_keys=[1"], "is not a value"),
    (["--set", "adain_keys=3"], "adain_keys must be True or False"),
    (["--set", "layers=[nothing.like.this]"], "nothing.like.this"),
    (["--backend", "magic"], "backend"),
    (["--device", "abacus"], "no device 'abacus'"),
    (["--dtype", "int3"], "unknown dtype 'int3'"),
    (["--scheduler", "magic"], "unknown scheduler"),
    (["--labels", "magic"], "unknown labels"),
    (["--steps", "0"], "num_inference_steps"),
    (["--steps", "1001"], "num_inference_steps must lie in 1..1000"),
    (["--seed", "-1"], "seed must lie in 0.."),
    (["--seed", str(2**64)], "seed must lie in 0.."),
    (["--steps", "many"], "--steps"),
    (["--guidance", "nan"], "guidance_scale"),
    (["--inversion-guidance", "inf"], "guidance_scale of the inversion"),
    (["--batch-size", "0"], "batch_size"),
    (["--height", "31"], "multiples of 2"),
    (["--offset", "99"], "offset"),
    (["--bank", "{work}/style.png"], "--bank excludes --reference"),
    (["--reference-weight", "-1"], "must be finite and not negative"),
    (["--reference-weight", "1", "--reference-weight", "2"], "1 references need as many"),
    (["--reference-prompt", "a", "--reference-prompt", "b"], "1 references need as many"),
    (["--config", "{work}/no.yaml"], "No such file"),
    (["--config", "{work}/bad.yaml"], "is not YAML"),
    (["--config", "{work}/list.yaml"], "must hold a mapping"),
    (["--config", "{work}/unknown.yaml"], "unknown settings stepz"),
    (["--config", "{work}/kind.yaml"], "seed must be of type int"),
    (["--no-such-option"], "no such option"),
    (["--out", "{work}/style.png"], "File exists"),
    (["--out", "{work}/style.png/out"], "Not a directory"),
    (["--out", "/proc/styleattn"], "/proc/styleattn"),
]


def test_a_backend_that_is_not_here(model, work, capsys, monkeypatch):
    from styleattn.pipelines import folder

    table = Backends([BackendStatus("triton", False, "no GPU")])
    monkeypatch.setattr(folder, "backends", lambda: table)
    line = refused(stylize(model, work, "--backend", "triton"), capsys)
    assert "backend 'triton' cannot run here: no GPU" in line
    assert not (work / "out").exists()


@pytest.mark.parametrize(("change", "message"), BAD, ids=["_".join(c)[:40] for c, _ in BAD])
def test_bad_input(model, work, capsys, change, message):
    (work / "empty.txt").write_text("\n# nothing\n")
    (work / "cut.png").write_bytes((work / "style.png").read_bytes()[:500])
    (work / "bad.yaml").write_text("a: [")
    (work / "list.yaml").write_text("- a")
    (work / "unknown.yaml").write_text("stepz: 3")
    (work / "kind.yaml").write_text("seed: lots")
    before = sorted(path.name for path in work.iterdir())
    argv = [part.format(work=work) for part in change]
    line = refused(stylize(model, work, *argv), capsys)
    assert message.lower() in line.lower(), line
    written = {path.name for path in work.rglob("*")} - set(before)
    assert not written, written
    if "manifest.json" in written:
        assert not json.loads((work / "out" / "manifest.json").read_text())["complete"]


@pytest.mark.parametrize("missing", ["--prompts", "--out", "--reference"])
def test_missing_inputs(model, work, capsys, missing):
    argv = stylize(model, work)
    where = argv.index(missing)
    del argv[where : where + 2]
    assert missing in refused(argv, capsys)


def test_damaged_models(model, work, capsys):
    broken = work / "broken"
    damages = {
        "unet/diffusion_pytorch_model.safetensors": lambda path: os.truncate(path, 1000),
        "text_encoder/config.json": lambda path: path.write_text("{"),
        "vae/config.json": lambda path: path.unlink(),
        "model_index.json": lambda path: path.write_text('{"_class_name": "NoSuchPipeline"}'),
    }
    for name, damage in damages.items():
        shutil.copytree(model, broken)
        damage(broken / name)
        line = refused(stylize(str(broken), work), capsys)
        assert str(broken) in line and not (work / "out").exists()
        shutil.rmtree(broken)


def test_models_of_another_kind(work, capsys):
    import random_pipelines

    random_pipelines.sd(in_channels=9).save_pretrained(work / "inpainting")
    line = refused(stylize(str(work / "inpainting"), work), capsys)
    assert "9 channels" in line


def test_a_full_disk(model, work, capsys, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left on device" in refused(stylize(model, work), capsys)
    assert list((work / "out").iterdir()) == []
    bank = ["bank", "build", "--model", model, "--reference", str(work / "style.png")]
    line = refused([*bank, "--out", str(work / "b.safetensors"), "--steps", "1"], capsys)
    assert "No space left on device" in line
    assert not list(work.glob("*b.safetensors*"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission(model, work, capsys):
    (work / "out").mkdir(mode=0o500)
    assert "Permission denied" in refused(stylize(model, work), capsys)


def test_bad_banks(model, work, capsys):
    assert "no such file" in refused(["bank", "inspect", str(work / "no")], capsys)
    assert "not a whole" in refused(["bank", "inspect", str(work / "style.png")], capsys)
    build = ["bank", "build", "--model", model, "--reference", str(work / "style.png")]
    line = refused([*build, "--out", str(work / "no" / "b.safetensors")], capsys)
    assert "no directory to stand in" in line


def test_without_diffusers(model, work):
    """What needs no host works without one; what does says which package is missing."""
    program = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from styleattn import cli\n"
        "assert cli.main(['methods']) == 0\n"
        "assert cli.main(['doctor']) in (0, 1)\n"
        f"sys.exit(cli.main({stylize(model, work)!r}))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("styleattn: diffusers is not installed: pip install"), run.stderr
    assert "absent  diffusers" not in run.stdout and "device cpu" in run.stdout


def test_out_of_memory(model, work, capsys, monkeypatch):
    import torch

    import styleattn.pipelines.drawing as folder

    def too_much(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(folder, "generate", too_much)
    assert "--batch-size" in refused(stylize(model, work), capsys)


def test_our_own_faults_are_not_hidden(model, work, monkeypatch):
    import styleattn.pipelines.drawing as folder

    def bug(*args, **kwargs):
        raise AttributeError("a bug")

    monkeypatch.setattr(folder, "generate", bug)
    with pytest.raises(AttributeError, match="a bug"):
        cli.main(stylize(model, work))


def test_bench(capfd, monkeypatch, tmp_path):
    import styleattn

    assert cli.main(["bench", "--help"]) == 0
    assert "--shapes" in capfd.readouterr().out  # of benchmarks/run.py
    monkeypatch.setattr(styleattn, "__file__", str(tmp_path / "styleattn" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "in the repository" in capfd.readouterr().err


def test_unknown_commands(capsys):
    assert "nonsense" in refused(["nonsense"], capsys)
