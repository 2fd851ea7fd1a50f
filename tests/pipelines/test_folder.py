"""Folders of pictures: the same bits whatever happens on the way, and nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from styleattn.inversion import files
from styleattn.pipelines import Job, Sampling, Source, make_bank, make_trajectory, run_folder
from styleattn.pipelines.folder import MANIFEST, SHEET
from styleattn.pipelines.sources import BANK
from styleattn.references import StyleBank

JOB = Job(("a cat", "a dog", "a hen"), sampling=Sampling(3, 3.0), batch_size=2)


def reference() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SOURCES = [Source(reference(), "a train")]


@pytest.fixture(scope="module")
def pipe(hosts):
    return hosts.sdxl()


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("0*.png"))}


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory) -> dict[str, bytes]:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    run_folder(pipe, JOB, out, sources=SOURCES)
    return pictures(out)


def test_a_whole_run(pipe, whole, tmp_path):
    manifest = run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    assert pictures(tmp_path) == whole  # bit for bit
    assert sorted(whole) == ["0000-a-cat.png", "0001-a-dog.png", "0002-a-hen.png"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*whole, MANIFEST, SHEET, BANK}
    assert json.loads((tmp_path / MANIFEST).read_text()) == manifest
    assert manifest["complete"] and manifest["settings"]["sampling"]["num_inference_steps"] == 3
    assert manifest["versions"]["torch"] == torch.__version__
    for name, entry in zip(sorted(whole), manifest["pictures"], strict=True):
        assert entry["file"] == name and not entry["found"] and entry["seconds"] > 0
        assert entry["sha256"] == hashlib.sha256(whole[name]).hexdigest()
    assert [entry["batch"] for entry in manifest["pictures"]] == [0, 0, 1]
    assert Image.open(tmp_path / SHEET).size[0] > 4 * 192
    assert StyleBank.load(tmp_path / BANK).offset == 2


def test_finished_pictures_are_left_alone(pipe, whole, tmp_path):
    run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    seen = []
    manifest = run_folder(
        pipe, JOB, tmp_path, sources=SOURCES, progress=lambda stage, *_: seen.append(stage)
    )
    assert "reference" not in seen
    assert all(entry["found"] for entry in manifest["pictures"])
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("moment", [("reference", 2), ("pictures", 1), ("pictures", 4)])
def test_interrupted_runs_end_with_the_same_bits(pipe, whole, tmp_path, moment):
    class Killed(BaseException):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == moment:
            raise Killed

    with pytest.raises(Killed):
        run_folder(pipe, JOB, tmp_path, sources=SOURCES, progress=kill)
    left = json.loads((tmp_path / MANIFEST).read_text())
    assert not left["complete"] and not list(tmp_path.glob("*.tmp"))
    for name, data in pictures(tmp_path).items():
        assert data == whole[name]
    manifest = run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    assert manifest["complete"] and pictures(tmp_path) == whole
    assert {path.name for path in tmp_path.iterdir()} == {*whole, MANIFEST, SHEET, BANK}


def test_lost_and_damaged_pictures_are_made_again(pipe, whole, tmp_path):
    run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    (tmp_path / "0001-a-dog.png").unlink()
    cut = tmp_path / "0002-a-hen.png"
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / BANK).write_bytes(b"damaged")
    manifest = run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    assert pictures(tmp_path) == whole
    assert [entry["found"] for entry in manifest["pictures"]] == [True, False, False]


def test_other_settings_make_other_pictures(pipe, whole, tmp_path):
    run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    changes = (
        {"seed": 1},
        {"sampling": Sampling(3, 4.0)},
        {"method": replace(JOB.method, shared_score_scale=0.5)},
    )
    for change in changes:
        manifest = run_folder(pipe, replace(JOB, **change), tmp_path, sources=SOURCES)
        assert not any(entry["found"] for entry in manifest["pictures"]), change
    plane = run_folder(pipe, JOB, tmp_path, sources=[Source(reference(), "a plane")])
    assert not any(entry["found"] for entry in plane["pictures"])
    other = run_folder(pipe, JOB, tmp_path, sources=[Source(reference().rotate(90), "a train")])
    assert not any(entry["found"] for entry in other["pictures"])
    run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    assert pictures(tmp_path) == whole


def test_another_batch_size_keeps_what_is_there(pipe, whole, tmp_path):
    run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    manifest = run_folder(pipe, replace(JOB, batch_size=1), tmp_path, sources=SOURCES)
    assert all(entry["found"] for entry in manifest["pictures"])
    assert pictures(tmp_path) == whole


def test_a_bank_in_place_of_a_reference(pipe, whole, tmp_path):
    trajectory = make_trajectory(pipe, reference(), "a train", JOB.sampling, JOB.inversion)
    bank = make_bank(pipe, trajectory, JOB.method)
    run_folder(pipe, JOB, tmp_path, bank=bank)
    assert not (tmp_path / BANK).exists()
    for name in whole:
        with Image.open(tmp_path / name) as found:
            assert found.size == (32, 32)


def test_a_reference_made_from_its_prompt(pipe, tmp_path):
    manifest = run_folder(pipe, JOB, tmp_path, sources=[Source(prompt="a painting")])
    assert manifest["complete"] and StyleBank.load(tmp_path / BANK).offset == 0


def test_a_full_disk(pipe, whole, tmp_path, monkeypatch):
    """The disk fills up at the second picture: the first is whole, the rest is not there."""
    sync, count = os.fsync, []

    def fills_up(descriptor: int) -> None:
        count.append(descriptor)
        if len(count) == 4:  # manifest, bank, first picture, second picture
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fills_up)
    with pytest.raises(OSError, match="No space left"):
        run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"0000-a-cat.png", MANIFEST, BANK}
    assert (tmp_path / "0000-a-cat.png").read_bytes() == whole["0000-a-cat.png"]
    run_folder(pipe, JOB, tmp_path, sources=SOURCES)
    assert pictures(tmp_path) == whole


def test_nothing_to_go_by(pipe, tmp_path):
    with pytest.raises(ValueError, match="no reference"):
        run_folder(pipe, JOB, tmp_path / "out")
    with pytest.raises(ValueError, match="no prompts"):
        run_folder(pipe, replace(JOB, prompts=()), tmp_path / "out", sources=SOURCES)
    assert not (tmp_path / "out").exists()


def test_names(pipe, tmp_path):
    prompts = ("Ein Öl-Bild / ../x", "日本", "a" * 99)
    run_folder(
        pipe, replace(JOB, prompts=prompts, sampling=Sampling(1, 1.0)), tmp_path, sources=SOURCES
    )
    names = sorted(pictures(tmp_path))
    assert names == ["0000-ein-l-bild-x.png", "0001-picture.png", f"0002-{'a' * 40}.png"]
