"""`tiny-flux` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from styleattn import cli, tiny


@pytest.mark.parametrize("method", ["style_aligned", "aligned_gen", "ip_adapter", "instant_style"])
def test_two_prompts_in_the_style_of_a_picture(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Methods that show pictures to an encoder find the package's adapter by themselves."""
    torch.set_num_threads(1)
    reference = tiny.references()[0]
    reference.image.save(tmp_path / "style.png")
    (tmp_path / "prompts.txt").write_text("a star\na boat")
    argv = ["stylize", "--model", "tiny-flux", "--method", method, "--steps", "4"]
    argv += ["--reference", str(tmp_path / "style.png"), "--reference-prompt", reference.prompt]
    argv += ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    assert "2 of 2 pictures" in capsys.readouterr().out
    sizes = [Image.open(path).size for path in (tmp_path / "out").glob("0*.png")]
    assert sizes == [(32, 32)] * 2
    assert cli.main(["explain", "--model", "tiny-flux", "--method", method]) == 0
    assert "single_transformer_blocks" in capsys.readouterr().out
