"""Parallel decoding of masked diffusion language models: LocalLeap and the rules that it is compared with.

For anyone who samples from a model that fills in masks (LLaDA, Dream, any bidirectional masked language model):
`diffusion_generate` takes a callable from tokens to logits, `load` reads a checkpoint from a local folder, `complete`
goes from text to text, and `Decoding` is the same step by step. Each model call predicts every masked position of the
active block; a rule says which predictions stay. `LocalLeap` commits what lies near a confident prediction under a
lower threshold. Source: Kong et al., Accelerating Diffusion LLM Inference via Local Determinism Propagation,
arXiv 2510.07081.
"""

from locally.sequence.diffusion_decoding.analysis import Agreement, DelayedDecoding, analyze_delayed_decoding
from locally.sequence.diffusion_decoding.bidirectional import BidirectionalLM, BlockCache, build
from locally.sequence.diffusion_decoding.generation import (
    Decoding,
    DiffusionConfig,
    DiffusionOutput,
    Status,
    Step,
    WindowedModel,
    diffusion_generate,
)
from locally.sequence.diffusion_decoding.loading import Kind, LanguageModel, load, save
from locally.sequence.diffusion_decoding.prediction import Prediction, predict
from locally.sequence.diffusion_decoding.rules import CommitRule, FixedCount, LocalLeap, Schedule, Threshold
from locally.sequence.diffusion_decoding.text import Completion, complete

__all__ = [
    "Agreement",
    "BidirectionalLM",
    "BlockCache",
    "CommitRule",
    "Completion",
    "Decoding",
    "DelayedDecoding",
    "DiffusionConfig",
    "DiffusionOutput",
    "FixedCount",
    "Kind",
    "LanguageModel",
    "LocalLeap",
    "Prediction",
    "Schedule",
    "Status",
    "Step",
    "Threshold",
    "WindowedModel",
    "analyze_delayed_decoding",
    "build",
    "complete",
    "diffusion_generate",
    "load",
    "predict",
    "save",
]
