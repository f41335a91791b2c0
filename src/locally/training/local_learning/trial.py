"""One rule tried on a small residual network: what experiments with local rules on images at hand share."""

from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from locally.training.local_learning.chain import Chain
from locally.training.local_learning.images import ImageSet
from locally.training.local_learning.isolation import LocalLearner, Rule
from locally.training.local_learning.networks import residual_network
from locally.training.local_learning.trainer import Trainer, warm_cosine


@dataclass(frozen=True)
class Trial:
    """A rule and a seed.

    Args:
        rule: how blocks learn.
        seed: of the network, of what the rule adds, and of the order of the images.
        whole: one block, that is end-to-end back-propagation; otherwise every stage is one.
    """

    rule: Rule
    seed: int = 0
    whole: bool = False

    def network(self) -> Chain:
        """Ten stages for images with one channel: a convolution and nine residual blocks of 8, 16 and 32 channels."""
        generator = torch.Generator().manual_seed(self.seed)
        return residual_network([3] * 3, [8, 16, 32], in_channels=1, generator=generator)

    def learner(self, net: nn.Module, example: Tensor, classes: int = 10) -> LocalLearner:
        """`net` under this rule; `example` holds two images or more."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        cuts = 1 if self.whole else None
        return LocalLearner(net, self.rule, example=example[:2], classes=classes, cuts=cuts, generator=generator)

    def train(self, data: ImageSet, *, epochs: int, batch: int, rate: float = 0.1) -> tuple[float, float]:
        """Test accuracy after training the small network, and seconds a step.

        >>> from locally.training.local_learning import LinearHeads
        >>> from locally.training.local_learning.images import digits
        >>> accuracy, _ = Trial(LinearHeads(), whole=True).train(digits(), epochs=1, batch=64)
        >>> accuracy > 0.1
        True
        """
        x, x_test = (part.contiguous(memory_format=torch.channels_last) for part in (data.x, data.x_test))
        net = self.network().to(x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        learner = self.learner(net, x)
        start = perf_counter()
        Trainer(epochs=epochs, batch_size=batch, schedule=warm_cosine(rate), seed=self.seed).fit(learner, x, data.y)
        seconds = (perf_counter() - start) / (epochs * (len(x) // batch))
        return learner.accuracy(x_test, data.y_test), seconds
