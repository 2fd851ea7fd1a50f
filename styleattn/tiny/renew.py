"""Start the transformers of a run anew: `python -m styleattn.tiny.renew --out DIR`.

For a run in which they became constants: the tokens were one large common vector plus a little
information, every query attended to one token, and the outputs were alike for all drawings. A
renewed transformer gets fresh weights, inputs that are centred and scaled on drawings, and the mean
of its old output as bias, so the rest of the UNet still finds what it is used to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .train import Run, Settings, make_batch
from .training import add_settings


@torch.no_grad()
def _moments(run: Run, batches: int) -> dict[str, list[torch.Tensor]]:
    """The normed input and what is added to the input, [pixels, channels], by name of the
    transformer with ".in" and ".out"."""
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            normed, added = module.get_submodule("norm")(inputs[0]), output[0] - inputs[0]
            for end, x in (("in", normed), ("out", added)):
                found.setdefault(f"{name}.{end}", []).append(x.movedim(1, -1).flatten(0, 2))

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in _transformers(run)]
    run.groups.count = 0
    for step in range(batches):
        batch = make_batch(run.settings, 10**6 + step, run.tokenizer)
        alphas = run.alphas[batch.times][:, None, None, None]
        noisy = alphas.sqrt() * batch.latents + (1 - alphas).sqrt() * batch.noise
        run.model(noisy, batch.times, batch.ids, batch.keep)
    for handle in handles:
        handle.remove()
    return found


def _transformers(run: Run) -> list[tuple[str, Any]]:
    modules = run.model.unet.named_modules()
    return [(name, m) for name, m in modules if type(m).__name__ == "Transformer2DModel"]


@torch.no_grad()
def renew(folder: Path, settings: Settings, batches: int = 3) -> Run:
    """Renew every transformer in `folder/checkpoint.pt`; momentum and averages start anew too."""
    run = Run(folder, settings)
    moments = {name: torch.cat(values) for name, values in _moments(run, batches).items()}
    torch.manual_seed(settings.seed + 1)
    parameters = {p: name for name, p in run.model.named_parameters()}
    for name, module in _transformers(run):
        inputs, added = moments[f"{name}.in"], moments[f"{name}.out"]
        for part in module.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm):
                nn.init.ones_(part.weight)
                nn.init.zeros_(part.bias)
        module.proj_in.weight.div_(inputs.std(0).clamp_min(0.02))
        module.proj_in.bias.copy_(-module.proj_in.weight @ inputs.mean(0))
        module.proj_out.weight.mul_(0.5 * added.std(0).mean())
        module.proj_out.bias.copy_(added.mean(0))
        for parameter in (
            p
            for part in (module.proj_in, module.proj_out, module.transformer_blocks)
            for p in part.parameters()
        ):
            run.mean[parameters[parameter]].copy_(parameter)
            for optimizer in run.optimizers:
                optimizer.state.pop(parameter, None)
    run.history.append({"step": run.step, "renewed": "transformers"})
    run.save()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m styleattn.tiny.renew", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    add_settings(parser, Settings())
    values = vars(parser.parse_args())
    torch.set_num_threads(1)
    renew(values.pop("out"), Settings(**values))


if __name__ == "__main__":
    main()
