"""The common ground of supervised local learning: chains of stages, gradient-isolated blocks, baselines, memory."""

from locally.training.local_learning.chain import Chain
from locally.training.local_learning.initialization import reinitialize
from locally.training.local_learning.isolation import LocalLearner, Objective, Plan, Rule
from locally.training.local_learning.memory import MemoryReport, SavedTensors, measure_memory, saved_peak
from locally.training.local_learning.networks import (
    BasicBlock,
    Bottleneck,
    ConvStage,
    Stage,
    cifar_resnet,
    imagenet_resnet,
    residual_network,
    vgg,
)
from locally.training.local_learning.rules import DGL, InfoPro, LinearHeads, PredSim, similarity_matrix
from locally.training.local_learning.trainer import History, Status, Trainer, epoch_cosine, warm_cosine
from locally.training.local_learning.trial import Trial

__all__ = [
    "DGL",
    "BasicBlock",
    "Bottleneck",
    "Chain",
    "ConvStage",
    "History",
    "InfoPro",
    "LinearHeads",
    "LocalLearner",
    "MemoryReport",
    "Objective",
    "Plan",
    "PredSim",
    "Rule",
    "SavedTensors",
    "Stage",
    "Status",
    "Trainer",
    "Trial",
    "cifar_resnet",
    "epoch_cosine",
    "imagenet_resnet",
    "measure_memory",
    "reinitialize",
    "residual_network",
    "saved_peak",
    "similarity_matrix",
    "vgg",
    "warm_cosine",
]
