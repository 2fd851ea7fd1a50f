"""Trajectories: which latent when, and files that are whole or refused."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from styleattn.inversion import FileRefused, Trajectory, files


@pytest.fixture
def trajectory() -> Trajectory:
    steps = 50
    generator = torch.Generator().manual_seed(0)
    return Trajectory(
        latents=torch.randn(steps + 1, 4, 3, 5, generator=generator),
        timesteps=torch.arange(steps - 1, -1, -1) * 20,
        alphas=torch.linspace(0.01, 1.0, steps + 1, dtype=torch.float64),
        prompt="ein Zug, Öl",
        guidance_scale=2.0,
        height=24,
        width=40,
        fingerprint="abc",
        round_trip_error=0.25,
    )


def official_indices(steps: int, offset: int) -> list[int]:
    """Row 0 starts as zts[offset]; after step i it becomes zts[max(offset + 1, i + 1)]."""
    current, seen = offset, []
    for i in range(steps):
        seen.append(current)
        current = max(offset + 1, i + 1)
    return seen


@pytest.mark.parametrize("offset", [0, 5])
def test_reference_index_is_the_papers(trajectory, offset):
    steps = len(trajectory)
    found = [trajectory.reference_index(i, offset) for i in range(steps)]
    expected = official_indices(steps, offset)
    # offset 0 means "no mismatch": the official loop would already hold zts[1] at step 0 + 1, as
    # ours
    assert found == expected
    if offset == 5:
        assert found[:8] == [5, 6, 6, 6, 6, 6, 6, 7]


def test_reference_table_follows_the_timesteps(trajectory):
    table = trajectory.reference_table(offset=0)
    assert table.shape == (1000,) and table.dtype == torch.int64
    assert table[980] == 0 and table[999] == 0 and table[0] == 49
    assert table[451] == trajectory.step_of(451) == 26  # nearest of 460 and 440
    assert trajectory.reference_table(offset=5)[980] == 5
    assert trajectory.reference_index(10_000) == len(trajectory)


def test_round_trip_through_a_file(trajectory, tmp_path):
    path = tmp_path / "a.safetensors"
    trajectory.save(path)
    back = Trajectory.load(path)
    for name in ("latents", "timesteps", "alphas"):
        assert torch.equal(getattr(back, name), getattr(trajectory, name))
        assert getattr(back, name).dtype == getattr(trajectory, name).dtype
    assert back.to_parts()[1] == trajectory.to_parts()[1]
    assert back.summary()["steps"] == 50 and back.nbytes == 51 * 4 * 3 * 5 * 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_refuses_files_that_are_not_whole(trajectory, tmp_path):
    path = tmp_path / "a.safetensors"
    trajectory.save(path)
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FileRefused, match="not a whole safetensors file"):
            Trajectory.load(path)
    path.write_bytes(b"\x89PNG" + data)
    with pytest.raises(FileRefused, match=r"a\.safetensors"):
        Trajectory.load(path)


def test_refuses_foreign_files(trajectory, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Trajectory.load(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(FileRefused, match=r"not a styleattn\.trajectory file"):
        Trajectory.load(path)
    tensors, metadata = trajectory.to_parts()
    files.save_tensors(path, tensors, "styleattn.trajectory", {**metadata, "version": 99})
    with pytest.raises(FileRefused, match="version 99"):
        Trajectory.load(path)
    del tensors["alphas"]
    files.save_tensors(path, tensors, "styleattn.trajectory", metadata)
    with pytest.raises(FileRefused, match="do not fit"):
        Trajectory.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(3, 4, 3, 5)}, "need"),
        ({"latents": torch.full((51, 4, 3, 5), float("nan"))}, "finite"),
        ({"timesteps": torch.arange(50)}, "descend"),
        ({"alphas": torch.ones(3)}, "alphas"),
        ({"method": "magic"}, "method"),
    ],
)
def test_refuses_parts_that_do_not_belong_together(trajectory, change, message):
    with pytest.raises(ValueError, match=message):
        replace(trajectory, **change)


def test_a_full_disk_leaves_nothing(trajectory, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    trajectory.save(path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace(trajectory, prompt="other").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_get_ordinary_permissions(tmp_path):
    path = tmp_path / "a.json"
    mask = os.umask(0o022)
    try:
        files.write_json(path, {"ü": 1})
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.read_text() == '{\n  "ü": 1\n}\n'
