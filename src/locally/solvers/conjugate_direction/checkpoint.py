"""Networks on disk: safetensors with the architecture and the training in the header, read without unpickling."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from locally.checks import check_choice
from locally.solvers.conjugate_direction.network import DirectionNetwork, NetworkConfig

FORMAT = "locally conjugate-direction network 1"
WEIGHTS = Path(__file__).parent / "weights"


class CheckpointError(ValueError):
    """A file that holds no network to solve with; names the file and says why."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class Metadata:
    """The header of a checkpoint: architecture, steps of training, (step, validation loss), how it was trained."""

    network: NetworkConfig
    steps: int
    validations: tuple[tuple[int, float], ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_header(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "network": json.dumps(self.network.to_dict()),
            "steps": str(self.steps),
            "validations": json.dumps(self.validations),
            "training": json.dumps(dict(self.training)),
        }

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> "Metadata":
        return cls(
            NetworkConfig(**json.loads(header["network"])),
            int(header["steps"]),
            tuple((int(step), float(loss)) for step, loss in json.loads(header["validations"])),
            json.loads(header["training"]),
        )


def save_network(path: str | Path, network: DirectionNetwork, *, steps: int, **training: Any) -> None:
    """Write the weights alone; `steps` says how long they were trained, `training` how (JSON values)."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    write_checkpoint(path, tensors, Metadata(network.config, steps, (), training))


def load_network(path: str | Path, *, device: str | torch.device = "cpu") -> DirectionNetwork:
    """The trained network of a checkpoint, in evaluation mode.

    Raises:
        CheckpointError: no such file, not safetensors, not of this kind, never trained, or with weights that are
            missing, misshapen or not finite.
    """
    metadata, tensors = read_checkpoint(path)
    if metadata.steps == 0:
        raise CheckpointError(path, "the network was never trained")
    network = DirectionNetwork(metadata.network, generator=torch.Generator().manual_seed(0))
    weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    expected = network.state_dict()
    wrong = [k for k in expected if k not in weights or weights[k].shape != expected[k].shape]
    if wrong or len(weights) != len(expected):
        named = wrong[0] if wrong else next(k for k in weights if k not in expected)
        raise CheckpointError(path, f"its weights do not fit its architecture, {named} first of all")
    if not all(v.isfinite().all() for v in weights.values()):
        raise CheckpointError(path, "its weights hold NaN or infinity")
    network.load_state_dict(weights)
    network = network.to(device).eval()
    # a pass in 2-D takes two thirds of the time on a CPU, one in 3-D gains nothing
    if metadata.network.ndim == 2:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def load_pretrained(ndim: int, *, device: str | torch.device = "cpu") -> DirectionNetwork:
    """The network that ships with the package: for 2 (trained on 64 x 64 cells) or 3 axes (16 x 16 x 16).

    `python -m locally.solvers.conjugate_direction.train_pretrained` made both.

    Raises:
        ValueError: ndim is neither 2 nor 3.
    """
    check_choice("ndim", ndim, (2, 3))
    return load_network(pretrained_path(ndim), device=device)


def pretrained_path(ndim: int) -> Path:
    return WEIGHTS / f"poisson_{ndim}d.safetensors"


def read_checkpoint(path: str | Path) -> tuple[Metadata, dict[str, Tensor]]:
    """Header and tensors, whatever the network's state of training.

    Raises:
        CheckpointError: as for `load_network`, its training and weights aside.
    """
    if not Path(path).is_file():
        raise CheckpointError(path, "there is no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(path, "is a safetensors file, but no conjugate-direction network")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as error:
        raise CheckpointError(path, f"is no safetensors file ({error})") from None
    try:
        return Metadata.from_header(header), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"its header is damaged ({error})") from None


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Through a temporary neighbour, so that an interrupted write leaves the old file as it was."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(contiguous, str(partial), metadata=metadata.to_header())
    partial.replace(path)
