"""Private training of torch modules: per-example gradients, and a loop that leaves a private model behind.

For networks, whose gradients have no finite bounds: every per-example gradient is clipped to L0 at anchors, and every
per-example gradient difference to min(L1 ||w_t - w_{t-1}||, 2 L0) in between. Clipping biases the estimate; it never
weakens the guarantee. Source: arXiv 2206.00846, Algorithm 2, with the clipping that its Lipschitz constants stand for.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from locally.privacy.stationary.objectives import Beyond, PerExampleObjective
from locally.privacy.stationary.randomness import Randomness
from locally.privacy.stationary.result import PrivateResult
from locally.privacy.stationary.spider import Callback, NoisyGradientDescent, PrivateSpiderBoost
from locally.privacy.stationary.tree import PrivateTreeSpider

TrainingMethod = PrivateSpiderBoost | NoisyGradientDescent | PrivateTreeSpider
# Numbers held as per-example gradients at one time: what a processor's caches keep up with, more elsewhere.
GRADIENT_MEMORY = {"cpu": 2**22}
GRADIENT_MEMORY_ELSEWHERE = 2**26


class ModuleObjective(PerExampleObjective):
    """The training loss of a module as a finite sum over (input, target) pairs, in its trainable parameters.

    Args:
        module: any module that treats the examples of a batch separately.
        loss: `loss(module(inputs), targets)`, a mean or sum over the batch, as in `torch.nn.functional`.
        inputs, targets: one row per example, on the module's device.
        lipschitz: L0 > 0, the norm to which per-example gradients are clipped.
        smoothness: L1 > 0, differences are clipped to L1 times the distance moved. Both are hyper-parameters: choose
            them without looking at this data.
        beyond: clip (default) or refuse.
        chunk: examples whose gradients are held together; by default as many as suit the device.

    Raises:
        ValueError: the module mixes examples (batch normalisation) or draws random numbers (dropout) in training
            mode, has no trainable parameters, or a bound is not positive.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Tensor, Tensor], Float[Tensor, ""]],
        inputs: Shaped[Tensor, "n ..."],
        targets: Shaped[Tensor, "n ..."],
        *,
        lipschitz: float,
        smoothness: float,
        beyond: Beyond = Beyond.CLIP,
        chunk: int | None = None,
    ) -> None:
        check_separable(module)
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("module has no trainable parameters")
        shapes = {name: p.shape for name, p in trainable.items()}
        sizes = [p.numel() for p in trainable.values()]
        fixed = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
        fixed |= {name: b.detach() for name, b in module.named_buffers()}

        def unflatten(w: Float[Tensor, " d"]) -> dict[str, Tensor]:
            return {name: part.view(shapes[name]) for name, part in zip(shapes, w.split(sizes), strict=True)}

        def example_loss(w: Float[Tensor, " d"], x: Tensor, y: Tensor) -> Tensor:
            output = functional_call(module, (unflatten(w), fixed), (x.unsqueeze(0),))
            return loss(output, y.unsqueeze(0))

        memory = GRADIENT_MEMORY.get(inputs.device.type, GRADIENT_MEMORY_ELSEWHERE)
        super().__init__(
            vmap(grad(example_loss), in_dims=(None, 0, 0)),
            inputs,
            targets,
            dimension=sum(sizes),
            lipschitz=lipschitz,
            smoothness=smoothness,
            beyond=beyond,
            chunk=max(1, memory // sum(sizes)) if chunk is None else chunk,
        )
        self.trainable = trainable

    def initial_point(self) -> Float[Tensor, " d"]:
        """The module's present parameters: public if they were drawn, or trained on other data."""
        return torch.cat([p.detach().reshape(-1) for p in self.trainable.values()])

    def load(self, w: Float[Tensor, " d"]) -> None:
        """Write a parameter vector into the module."""
        with torch.no_grad():
            for p, part in zip(
                self.trainable.values(), w.split([p.numel() for p in self.trainable.values()]), strict=True
            ):
                p.copy_(part.view_as(p))


def fit_module(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Float[Tensor, ""]],
    inputs: Shaped[Tensor, "n ..."],
    targets: Shaped[Tensor, "n ..."],
    method: TrainingMethod,
    *,
    lipschitz: float,
    smoothness: float,
    beyond: Beyond = Beyond.CLIP,
    chunk: int | None = None,
    rng: int | torch.Generator | Randomness | None = None,
    callback: Callback | None = None,
) -> PrivateResult:
    """Train `module` in place from its present parameters; afterwards it holds the released ones.

    Arguments and errors as for `ModuleObjective` and the method's `minimize`. A diverged run leaves the last finite
    parameters in the module and says so in its status.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(400, 5); y = (x[:, 0] > 0).float()
    >>> net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    >>> method = PrivateSpiderBoost(epsilon=2.0, delta=1e-5, steps=40, phase=8, learning_rate=0.5)
    >>> loss = nn.functional.binary_cross_entropy_with_logits
    >>> fitted = fit_module(net, loss, x, y, method, lipschitz=1.0, smoothness=1.0, rng=0)
    >>> fitted.status, round(fitted.privacy.epsilon, 1)
    (<Status.FINISHED: 'finished'>, 2.0)
    """
    objective = ModuleObjective(
        module, loss, inputs, targets, lipschitz=lipschitz, smoothness=smoothness, beyond=beyond, chunk=chunk
    )
    found = method.minimize(objective, rng=rng, callback=callback)
    objective.load(found.w)
    return found


def check_separable(module: nn.Module) -> None:
    """Refuse layers through which one example reaches another's gradient, or that draw fresh randomness."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise ValueError(f"module mixes examples of a batch in {name!r} ({type(layer).__name__}): use GroupNorm")
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
            raise ValueError(f"module draws random numbers in {name!r} ({type(layer).__name__}): set it to eval mode")
