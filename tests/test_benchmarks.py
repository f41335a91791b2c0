"""What a comparison says: who wins, and whether it has got worse."""

import subprocess
import sys

import pytest
import torch

from benchmarks.harness import Comparison


def comparison(low: float, high: float, quantity: str = "time", peer: str = "SciPy") -> Comparison:
    return Comparison("a", quantity, (low + high) / 2, low, high, "ours", peer)


def test_a_peer_wins_when_the_whole_spread_is_on_its_side():
    assert comparison(1.1, 1.4).peer_wins
    assert not comparison(0.9, 1.4).peer_wins
    assert comparison(0.7, 0.9, "accuracy").peer_wins
    assert not comparison(1.1, 1.4, "nDCG@10").peer_wins
    assert not comparison(1.1, 1.4, "growth exponent", peer="").peer_wins


def test_worse_means_by_more_than_both_spreads():
    stored = comparison(0.8, 1.0)
    assert comparison(1.1, 1.2).worse_than(stored)
    assert not comparison(0.9, 1.2).worse_than(stored)
    assert not comparison(0.1, 0.2).worse_than(stored)
    assert comparison(0.5, 0.6, "median true score").worse_than(comparison(0.8, 1.0, "median true score"))


def test_the_checks_of_the_gpu_pass_on_the_processor():
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(": time, ") >= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_it_says_so():
    ended = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0
    assert ended.stdout.startswith("no CUDA card here")
