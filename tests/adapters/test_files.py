"""Checkpoints are read as tensors only, whole, and compared with what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from styleattn.adapters import read_tensors
from styleattn.adapters._files import fill, part
from styleattn.inversion import FileRefused


def test_nested_pickles_and_flat_safetensors_give_the_same_names(tmp_path: Path) -> None:
    a, b = torch.randn(2, 3), torch.randn(4, dtype=torch.float16)
    flat = {"image_proj.latents": a, "ip_adapter.1.to_k_ip.weight": b}
    save_file(flat, tmp_path / "a.safetensors")
    whole = {"image_proj": {"latents": a}, "ip_adapter": {"1.to_k_ip.weight": b}, "step": 7}
    torch.save(whole, tmp_path / "a.bin")
    torch.save(whole, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save(flat, tmp_path / "flat.pt")
    for name in ("a.safetensors", "a.bin", "old.ckpt", "flat.pt"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == flat.keys(), name
        for key, value in flat.items():
            assert torch.equal(found[key], value), name
            assert found[key].dtype == value.dtype, name


def test_the_kind_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "wrong.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "wrong.safetensors")
    for name in ("wrong.bin", "wrong.safetensors"):
        assert torch.equal(read_tensors(tmp_path / name)["a"], torch.ones(2))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_was_read_no_longer_depends_on_the_file(tmp_path: Path, kind: str) -> None:
    path, x = tmp_path / "file", torch.randn(64)
    save_file({"a": x}, path) if kind == "safetensors" else torch.save({"a": x}, path)
    found = read_tensors(path)["a"]
    with open(path, "r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert torch.equal(found, x)


class Trap:
    """What a hostile pickle does when it is loaded as objects."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_code_is_never_run(tmp_path: Path, new: bool) -> None:
    target = tmp_path / "ran"
    data = {"a": torch.ones(2), "b": Trap(target)}
    torch.save(data, tmp_path / "trap.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(FileRefused, match=r"trap\.bin .*more than tensors.*never loaded"):
        read_tensors(tmp_path / "trap.bin")
    assert not target.exists()
    torch.load(tmp_path / "trap.bin", weights_only=False)  # the trap works
    assert target.exists()


@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.99, -1])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / "file"
    data = {"a": torch.randn(64, 64)}
    if kind == "safetensors":
        save_file(data, path)
    else:
        torch.save(data, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(FileRefused, match="file"):
        read_tensors(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors(tmp_path / "absent")
    (tmp_path / "text").write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")
    torch.save([torch.ones(2)], tmp_path / "list")
    torch.save({"step": 3}, tmp_path / "empty")
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, tmp_path / "twice")
    for name, message in {
        "text": "neither a whole safetensors file nor a PyTorch checkpoint",
        "list": "holds a list, not a dictionary",
        "empty": "holds no tensor",
        "twice": "two tensors of the name a.b",
    }.items():
        with pytest.raises(FileRefused, match=message):
            read_tensors(tmp_path / name)


def test_one_error_names_every_fault() -> None:
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(2, 3) for _ in range(10)))
    good = {k: torch.randn(v.shape) for k, v in module.state_dict().items()}
    bad = {**good, "extra": torch.ones(1), "0.weight": torch.ones(3, 3)}
    bad["1.bias"] = torch.ones(3, dtype=torch.int64)
    for i in range(2, 10):
        del bad[f"{i}.weight"]
    with pytest.raises(FileRefused) as caught:
        fill(module, bad, source="x.bin", what="a stack")
    assert str(caught.value).splitlines() == [
        "x.bin is not a stack:",
        "    missing 8: 2.weight, 3.weight, 4.weight, 5.weight, 6.weight, 7.weight, and 2 more",
        "    unexpected 1: extra",
        "    wrong 2: 0.weight is [3, 3], not [3, 2], 1.bias is [3] of int64, not [3]",
    ]
    assert all(p.is_meta for p in module.parameters())  # nothing was taken


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept_or_converted(dtype: torch.dtype | None) -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    fill(
        module,
        {"weight": torch.ones(3, 2).half(), "bias": torch.ones(3).half()},
        source="x",
        what="a linear",
        dtype=dtype,
    )
    assert {p.dtype for p in module.parameters()} == {dtype or torch.float16}
    assert not any(p.requires_grad for p in module.parameters())


def test_part_takes_the_names_under_a_prefix() -> None:
    tensors = {"a.b": torch.ones(1), "a.c.d": torch.ones(1), "ab": torch.ones(1)}
    assert set(part(tensors, "a.")) == {"b", "c.d"}
