"""StyleStudio with its teacher: each picture is made next to one of the same text and noise, which
has no style."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from styleattn.methods import StyleStudioTeacher

from .drawing import Drawing


def draw(drawing: Drawing) -> list[Image.Image]:
    """A styled picture, whose self-attention looks where the teacher's does for the first steps.

    The teacher is the first row of the batch: the same prompt and seed, and no style. One picture
    at a time, whose teacher it is.

    Source: Lei et al., StyleStudio, CVPR 2025, arXiv 2412.08503, sec. 3.4.
    """
    references = tuple(replace(r, prompts=(1,)) for r in drawing.method.references)
    method = replace(drawing.method, references=references)
    pair = replace(drawing, prompts=list(drawing.prompts) * 2, seeds=list(drawing.seeds) * 2)
    return pair.generate(method, StyleStudioTeacher())[1:]
