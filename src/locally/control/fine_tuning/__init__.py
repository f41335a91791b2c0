"""Online exploration that starts from offline data: a near-optimal policy, certified, with few new episodes.

`FTPedel` is the learner, `OfflineDataset` the log. `offline_to_online_coefficient` and `minimal_online_samples` say how
much a log is worth where the process is known; `pessimistic_policy` and `LSVIUCB` are what one would do without.
Source: Wagenmaker & Pacchiano, arXiv 2211.04974.
"""

from locally.control.fine_tuning.baselines import LSVIUCB, PessimisticSolution, pessimistic_policy
from locally.control.fine_tuning.coverage import (
    features_of,
    minimal_online_samples,
    offline_to_online_coefficient,
    visited_features,
)
from locally.control.fine_tuning.design import Design, xy_design
from locally.control.fine_tuning.elimination import FTPedel
from locally.control.fine_tuning.exploration import collect, play_episodes
from locally.control.fine_tuning.offline import OfflineDataset
from locally.control.fine_tuning.policies import bootstrap_policies, deterministic_policies, reachable, softmax_cover
from locally.control.fine_tuning.results import Certificate, FineTuningResult, Phase, Status, proved_beta_scale

__all__ = [
    "LSVIUCB",
    "Certificate",
    "Design",
    "FTPedel",
    "FineTuningResult",
    "OfflineDataset",
    "PessimisticSolution",
    "Phase",
    "Status",
    "bootstrap_policies",
    "collect",
    "deterministic_policies",
    "features_of",
    "minimal_online_samples",
    "offline_to_online_coefficient",
    "pessimistic_policy",
    "play_episodes",
    "proved_beta_scale",
    "reachable",
    "softmax_cover",
    "visited_features",
    "xy_design",
]
