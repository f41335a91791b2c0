"""Biological sequences by bidirectional learning from a fixed table of measured ones.

`BIBDesigner` with a sequence model (`PretrainedLM` from a folder, `MaskedLM` trained in place) proposes sequences;
`adaptive_lr` is its learning-rate module for any designer that ascends by gradient; `BDIDesigner` and the searches in
`baselines` are what it is compared with. Source: Chen, Zhang, Liu and Coates, ICML 2023, arXiv 2301.02931.
"""

from locally.design.bidirectional.adaptive import AdaptiveRate, AdaptiveWeight, adaptive_lr
from locally.design.bidirectional.ascent import Ascent, AscentState, Auxiliary, Status, Step
from locally.design.bidirectional.auxiliary import RidgeEnsemble
from locally.design.bidirectional.baselines import CMAES, CbAS, Evolution, Reinforce
from locally.design.bidirectional.designer import BIBDesigner, DesignResult
from locally.design.bidirectional.heads import KernelHead, LinearizedHead, Losses
from locally.design.bidirectional.infinite_width import BDIDesigner, ReluTangentKernel
from locally.design.bidirectional.landscapes import MotifLandscape
from locally.design.bidirectional.language_model import MaskedLM, OneHotFeatures, SequenceModel, embed, pretrain
from locally.design.bidirectional.pretrained import ModelFolderError, PretrainedLM
from locally.design.bidirectional.relaxation import initial_logits, tokens
from locally.design.bidirectional.sequences import DNA, PROTEIN, RNA, SequenceSpace, hamming
from locally.design.bidirectional.tables import TableError, binding_task, read_binding, read_table
from locally.design.bidirectional.tangent_features import TangentFeatures
from locally.design.bidirectional.tasks import Evaluation, OfflineTask, evaluate_designs

__all__ = [
    "CMAES",
    "DNA",
    "PROTEIN",
    "RNA",
    "AdaptiveRate",
    "AdaptiveWeight",
    "Ascent",
    "AscentState",
    "Auxiliary",
    "BDIDesigner",
    "BIBDesigner",
    "CbAS",
    "DesignResult",
    "Evaluation",
    "Evolution",
    "KernelHead",
    "LinearizedHead",
    "Losses",
    "MaskedLM",
    "ModelFolderError",
    "MotifLandscape",
    "OfflineTask",
    "OneHotFeatures",
    "PretrainedLM",
    "Reinforce",
    "ReluTangentKernel",
    "RidgeEnsemble",
    "SequenceModel",
    "SequenceSpace",
    "Status",
    "Step",
    "TableError",
    "TangentFeatures",
    "adaptive_lr",
    "binding_task",
    "embed",
    "evaluate_designs",
    "hamming",
    "initial_logits",
    "pretrain",
    "read_binding",
    "read_table",
    "tokens",
]
