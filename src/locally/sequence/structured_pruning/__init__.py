"""Structured pruning of language models: whole heads and neurons, a share for every layer that a search finds.

For Llama, Mistral, Qwen2 and Qwen3 models of Transformers, without gradients or retraining: `TyrPruner` prunes and
refits every layer at several ratios, searches one for each, and writes a smaller checkpoint, which
`AutoModelForCausalLM.from_pretrained` opens once this module is imported. `local_prune` is the fit of one layer,
`prune_uniform` what one would otherwise do. Several processes prune one model as a `Team`. Source: Li et al.,
Týr-the-Pruner, arXiv 2503.09657.
"""

from importlib.util import find_spec

from locally.sequence.structured_pruning.baselines import prune_uniform
from locally.sequence.structured_pruning.calibration import BadText, read_windows
from locally.sequence.structured_pruning.cuts import BlockCut, Cut
from locally.sequence.structured_pruning.evaluation import (
    Size,
    Speed,
    log_likelihoods,
    perplexity,
    size_of,
    tokens_per_second,
)
from locally.sequence.structured_pruning.launch import launch
from locally.sequence.structured_pruning.levels import Space, SubLayer
from locally.sequence.structured_pruning.local import LocalPruneResult, local_prune, local_prune_levels
from locally.sequence.structured_pruning.network import Network, open_network
from locally.sequence.structured_pruning.pruner import TyrPruner, WorkFolderMismatch
from locally.sequence.structured_pruning.scoring import Scorer
from locally.sequence.structured_pruning.search import Batch, Progress, Schedule, search
from locally.sequence.structured_pruning.statistics import InputStatistics
from locally.sequence.structured_pruning.supernet import LocalSettings, Supernet, build_supernet
from locally.sequence.structured_pruning.team import LostMember, Team, processes_started, team_of_environment

__all__ = [
    "BadText",
    "Batch",
    "BlockCut",
    "Cut",
    "InputStatistics",
    "LocalPruneResult",
    "LocalSettings",
    "LostMember",
    "Network",
    "Progress",
    "Schedule",
    "Scorer",
    "Size",
    "Space",
    "Speed",
    "SubLayer",
    "Supernet",
    "Team",
    "TyrPruner",
    "WorkFolderMismatch",
    "build_supernet",
    "launch",
    "local_prune",
    "local_prune_levels",
    "log_likelihoods",
    "open_network",
    "perplexity",
    "processes_started",
    "prune_uniform",
    "read_windows",
    "search",
    "size_of",
    "team_of_environment",
    "tokens_per_second",
]

if find_spec("transformers") is not None:
    from locally.sequence.structured_pruning.pruned_model import compress, load_pruned, save_compressed

    __all__ += ["compress", "load_pruned", "save_compressed"]
