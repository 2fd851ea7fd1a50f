"""Small tensors on a device: one copy per content."""

from __future__ import annotations

import torch

from styleattn._maps import on_device

ELSEWHERE = torch.device("meta")


def test_one_copy_per_content():
    rows = torch.tensor([0, 0, 2])
    first = on_device(rows, ELSEWHERE)
    assert first.device.type == "meta" and first.dtype == torch.int64
    assert on_device(rows.clone(), ELSEWHERE) is first is on_device([0, 0, 2], ELSEWHERE)
    assert on_device(rows.int(), ELSEWHERE).dtype == torch.int32
    assert on_device([True, False], ELSEWHERE).dtype == torch.bool
    assert on_device([0, 0, 1], ELSEWHERE) is not first


def test_what_is_there_stays():
    rows = torch.tensor([1, -1])
    assert on_device(rows, torch.device("cpu")) is rows
    assert on_device([1, -1], torch.device("cpu")).tolist() == [1, -1]
