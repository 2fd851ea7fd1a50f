"""The one command for a rented GPU, without one: every stage runs, what it finds is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
import results
import tune
from shapes import SHAPES

from styleattn import measured
from styleattn.branch import Branch, Segment, normalize
from styleattn.kernels.attention import launch_of
from styleattn.measured import Choice, Key

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter


@pytest.fixture(autouse=True)
def table():
    yield measured.TABLE
    measured.TABLE.clear()


def stage(name, out):
    return next(s for s in gpu.dry_stages(out) if s.name == name)


def test_dry_run(tmp_path, capsys):
    chosen = ["build", "benchmark", "flux", "tuning", "table"]
    code = gpu.main(["--dry-run", "--out", str(tmp_path), "--stages", *chosen])
    told = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert code == 0 and list(summary) == chosen
    assert all(s["state"] == "ok" for s in summary.values())
    rows = results.load(tmp_path / "rows.csv")
    assert {r.provider for r in rows} == {"ours-triton", "official"}
    assert results.load(tmp_path / "steps.csv", results.StepRow)
    assert "sdxl-1024-shared-b2 float32 wall" in told and "redux ours" in told
    assert "+++ b/styleattn/measured.py" in told or "the table stays as it is" in told


def test_stages_share_the_time_and_exist():
    todo = gpu.stages(Path("out"), 9.5)
    assert [s.name for s in todo] == [
        "build", "tests", "benchmark", "sdxl", "flux", "tuning", "compiled", "table",
    ]  # fmt: skip
    assert sum(s.seconds for s in todo) <= 60 * 9.5 + 1
    assert all(s.script == "pytest" or (gpu.HERE / s.script).is_file() for s in todo)
    assert set(gpu.SHAPES) <= set(SHAPES)
    from providers import PROVIDERS

    assert {*gpu.PEERS, *gpu.COMPILED} <= set(PROVIDERS)


def test_a_stage_that_takes_too_long_is_ended(tmp_path):
    slow = gpu.Stage("slow", 0.01, "gpu.py", ("--help",))
    assert gpu._process(slow, tmp_path / "log") is None
    with pytest.raises(SystemExit):
        gpu.main(["--stages", "nothing"])


def call():
    x = torch.randn(2, 1, 70, 16)
    return x, normalize("test", x, (Branch((Segment(x, x),)),), None)


def block(x, normal, scale):
    launch = launch_of(
        x, normal, scale, torch.empty_like(x), torch.empty(1, 2, 1, 70), "interpreter"
    )
    return launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]


def test_the_table_cuts_the_kernel(table):
    x, (normal, scale) = call()
    usual = block(x, normal, scale)
    key = measured.key_of("interpreter", x.dtype, 16, 70, 70, 2)
    assert key == Key("interpreter", "float32", 16, 64, 64, 2)
    table[key] = Choice("triton", (32, 16, 1, 1))
    assert block(x, normal, scale) == (32, 16) != usual
    table[key] = Choice("torch")
    assert block(x, normal, scale) == usual


def test_the_table_chooses_the_backend(table):
    from styleattn.backends import resolve

    x, (normal, _) = call()
    usual = resolve("test", x, normal, None)
    table[measured.key_of("interpreter", x.dtype, 16, 70, 70, 2)] = Choice("triton")
    assert usual != "triton" == resolve("test", x, normal, None)
    assert resolve("test", x, normal, "reference") == "reference"
    assert resolve("test", x[:, :, :5].contiguous(), normal, None) == usual  # another length
    table[measured.key_of("interpreter", x.dtype, 16, 70, 70, 2)] = Choice("reference")
    assert resolve("test", x, normal, None) == "reference"


def test_tuning_leaves_wrong_and_failing_choices_out(table, monkeypatch, capsys):
    broken = (Choice("triton"), Choice("triton", (64, 24, 1, 1)), Choice("torch"))
    monkeypatch.setattr(tune, "candidates", lambda arch: list(broken))
    problem = SHAPES["sdxl-1024-shared-b2"].at("tiny")
    found = tune.tune(problem, torch.float32, torch.device("cpu"), 1, 0.0)
    assert set(found.others) == {broken[0], broken[2]} and "24" in capsys.readouterr().out
    assert not table


def test_the_diff_applies(tmp_path):
    key = Key("sm_90", "bfloat16", 64, 4096, 4096, 64)
    found = tune.Found(key, Choice("triton", (128, 64, 8, 2)), 1.0, {})
    lines = tune.diff([found]).splitlines()
    assert any(line.startswith("+    Key(") for line in lines)
    added = [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert "TABLE: dict[Key, Choice] = {" in added[0]
    made = eval("\n".join(["{", *added[1:]]), dict(vars(measured)))
    assert made == {key: found.choice}
    assert tune.diff([]) == ""
