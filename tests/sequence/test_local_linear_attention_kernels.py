"""The triton kernels in triton's interpreter against the definition in float64, and what asking for them needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from locally.errors import MissingExtra
from locally.sequence.local_linear_attention import launch, local_linear_attention
from tests.sequence.local_linear_attention_in_interpreter import CASES, NAMES


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    """From a process of its own: triton reads its variable when it is imported."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("interpreter") / "gaps.json"
    subprocess.run(
        [sys.executable, "-m", "tests.sequence.local_linear_attention_in_interpreter", path],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=300,
    )
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_definition(gaps, case):
    assert set(gaps[case]) == set(NAMES)
    assert max(gaps[case].values()) < 1e-3, gaps[case]
    assert max(gaps[case][name] for name in ("output", "delta", "omega")) < 1e-4


def test_the_kernels_are_not_chosen_for_the_cpu():
    q = torch.randn(1, 1, 5, 4)
    assert torch.equal(local_linear_attention(q, q, q), local_linear_attention(q, q, q, backend="torch"))


def test_asking_for_what_the_kernels_cannot_take_is_refused(monkeypatch):
    pytest.importorskip("triton")
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        local_linear_attention(q, q, q, backend="triton")
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    with pytest.raises(TypeError, match="float32"):
        local_linear_attention(q.double(), q.double(), q.double(), backend="triton")
    with pytest.raises(ValueError, match="solver must be"):
        local_linear_attention(q, q, q, backend="triton", solver="cholesky")
    wide = torch.randn(1, 1, 5, 200)
    with pytest.raises(ValueError, match="q must have a last dimension up to 128"):
        local_linear_attention(wide, wide, wide, backend="triton")
    with pytest.raises(ValueError, match="v must have a last dimension up to 128"):
        local_linear_attention(q, q, wide, backend="triton")


def test_auto_takes_the_kernels_only_for_what_they_can_do():
    pytest.importorskip("triton")
    q, wide = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 200)
    assert launch.suits(q, q, "auto")
    assert not launch.suits(q, q, "cholesky")
    assert not launch.suits(q.double(), q.double(), "cg")
    assert not launch.suits(q, wide, "cg")


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(MissingExtra, match="pip install triton"):
        local_linear_attention(q, q, q, backend="triton")
    assert not launch.suits(q, q, "cg")
