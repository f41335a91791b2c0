"""Trains the networks that ship with the package, or one of your own:

    python -m locally.solvers.conjugate_direction.train_pretrained                    both shipped ones
    python -m locally.solvers.conjugate_direction.train_pretrained --ndim 3 --size 128 --lanczos-steps 2000 \
        --steps 200000 --device cuda --fine-in 2 --coarse 4 --fine-out 3 --output network.safetensors

Each shipped one takes a few minutes on one core. An interrupted run goes on from its checkpoint, beside the output.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from locally.solvers.conjugate_direction import training
from locally.solvers.conjugate_direction.checkpoint import pretrained_path, save_network
from locally.solvers.conjugate_direction.network import DirectionNetwork, NetworkConfig
from locally.solvers.conjugate_direction.poisson import Domain

CHECKPOINT_EVERY = 200  # steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights. The grid is one box with open edges: no obstacle is seen in training."""

    network: NetworkConfig
    size: int
    steps: int
    lanczos_steps: int = 600
    theta: int = 30
    count: int = 4000
    seed: int = 0


RECIPES = {
    2: Recipe(network=NetworkConfig(ndim=2, channels=16), size=64, steps=4000),
    3: Recipe(network=NetworkConfig(ndim=3, channels=8), size=16, steps=1600),
}


def train(recipe: Recipe, output: Path, *, device: str = "cpu") -> float:
    """Carry the recipe out, with a progress bar; returns the loss on held-out residuals."""
    checkpoint = output.with_suffix(".training.safetensors")
    generator = torch.Generator().manual_seed(recipe.seed)
    network = DirectionNetwork(recipe.network, generator=generator).to(device)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as bars:
        domain = Domain.box(*[recipe.size] * recipe.network.ndim)
        bar = bars.add_task("Lanczos", total=recipe.lanczos_steps)
        system = training.TrainingSystem.from_ritz(
            domain,
            steps=recipe.lanczos_steps,
            theta=recipe.theta,
            count=recipe.count,
            rng=recipe.seed,
            callback=lambda done: bars.update(bar, completed=done),
        )
        config = training.TrainingConfig(steps=recipe.steps)
        trainer = training.Trainer(network, [system], config, seed=recipe.seed)
        if checkpoint.exists():
            trainer.resume(checkpoint)
        bar = bars.add_task("Training", total=recipe.steps)

        def show(progress: training.Progress) -> None:
            bars.update(bar, completed=progress.step)
            if progress.validation_loss is not None:
                bars.console.print(f"step {progress.step}: loss {progress.validation_loss:.5f} on held-out residuals")
            if progress.step % CHECKPOINT_EVERY == 0:
                trainer.save(checkpoint)

        trainer.run(callback=show)
    loss = trainer.validate()
    facts = {"grid": list(domain.shape), "validation_loss": loss, "seed": recipe.seed}
    save_network(output, network, steps=trainer.step, **facts)
    checkpoint.unlink(missing_ok=True)
    return loss


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train networks of search directions for Poisson systems.")
    parser.add_argument("--ndim", type=int, choices=sorted(RECIPES), help="default: both shipped networks, one by one")
    parser.add_argument("--output", type=Path, help="default: where the shipped weights lie")
    parser.add_argument("--device", default="cpu")
    for name in ("size", "steps", "lanczos-steps", "theta", "count", "seed"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("channels", "fine-in", "coarse", "fine-out"):
        parser.add_argument(f"--{name}", type=int, help="of the network")
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    device, output = given.pop("device"), given.pop("output", None)
    chosen = [given.pop("ndim")] if "ndim" in given else sorted(RECIPES)
    if output is not None and len(chosen) > 1:
        parser.error("--output needs --ndim")
    layers = {k: given.pop(k) for k in ("channels", "fine_in", "coarse", "fine_out") if k in given}
    for ndim in chosen:
        recipe = RECIPES[ndim]
        recipe = replace(recipe, network=replace(recipe.network, **layers), **given)
        path = output or pretrained_path(ndim)
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{path}: loss {train(recipe, path, device=device):.5f} on held-out residuals")


if __name__ == "__main__":
    main()
