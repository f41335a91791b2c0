"""Commit rules against a plain loop over positions and recorded selections; what confidence means."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locally.sequence.diffusion_decoding import FixedCount, LocalLeap, Schedule, Threshold, predict
from locally.sequence.diffusion_decoding.rules import near


def in_a_loop(confidence: list[float], masked: list[bool], tau_a: float, tau_r: float, radius: int) -> set[int]:
    """The rule as the paper tells it, position by position."""
    left = [i for i, m in enumerate(masked) if m]
    if not left:
        return set()
    chosen = {max(left, key=lambda i: (confidence[i], -i))}
    anchors = [i for i in left if confidence[i] >= tau_a]
    chosen.update(anchors)
    for a in anchors:
        chosen.update(j for j in left if abs(j - a) <= radius and confidence[j] >= tau_r)
    return chosen


def positions(commit: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in commit]


@given(
    n=st.integers(1, 20),
    radius=st.integers(0, 25),
    tau=st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)),
    shown=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_localleap_is_the_loop_over_positions(n, radius, tau, shown, seed):
    rng = np.random.default_rng(seed)
    confidence = rng.choice([0.0, tau[0], tau[1], 1.0, *rng.random(4)], (4, n))  # ties and exact thresholds
    masked = rng.random((4, n)) < shown
    tau_a, tau_r = max(tau), min(tau)
    found = LocalLeap(tau_a, tau_r, radius)(torch.from_numpy(confidence), torch.from_numpy(masked))
    wanted = [in_a_loop(c.tolist(), m.tolist(), tau_a, tau_r, radius) for c, m in zip(confidence, masked)]
    assert positions(found) == wanted


@given(n=st.integers(1, 24), radius=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_more_liberal_never_commits_less_in_one_call(n, radius, seed):
    rng = np.random.default_rng(seed)
    confidence, masked = torch.from_numpy(rng.random((3, n))), torch.from_numpy(rng.random((3, n)) < 0.7)
    strict = LocalLeap(0.8, 0.6, radius)(confidence, masked)
    for liberal in (LocalLeap(0.8, 0.5, radius), LocalLeap(0.8, 0.6, radius + 2), LocalLeap(0.7, 0.6, radius)):
        assert (strict <= liberal(confidence, masked)).all()
    assert (Threshold(0.8)(confidence, masked) <= strict).all()


@given(n=st.integers(1, 24), seed=st.integers(0, 2**31))
def test_where_the_rules_meet(n, seed):
    rng = np.random.default_rng(seed)
    confidence, masked = torch.from_numpy(rng.random((3, n))), torch.from_numpy(rng.random((3, n)) < 0.7)
    plain = Threshold(0.7)(confidence, masked)
    assert torch.equal(LocalLeap(0.7, 0.7, 5)(confidence, masked), plain)
    assert torch.equal(LocalLeap(0.7, 0.3, 0)(confidence, masked), plain)
    everywhere = LocalLeap(0.7, 0.3, n)(confidence, masked)
    anchored = (masked & (confidence >= 0.7)).any(1)
    assert torch.equal(everywhere[anchored], Threshold(0.3)(confidence, masked)[anchored])
    assert torch.equal(
        LocalLeap(np.nextafter(1, 0), 0.1, n)(confidence * 0.99, masked), FixedCount()(confidence, masked)
    )


def test_recorded_selections(golden):
    recorded = np.load(golden / "03-localleap" / "select.npz")
    logits, masked = torch.from_numpy(recorded["logits"]), torch.from_numpy(recorded["mask"])
    p = logits.softmax(-1)  # of the recorded model; nothing there is a mask
    confidence = p.amax(-1)
    names = [name for name in recorded if name not in ("logits", "mask", "x")]
    assert len(names) == 5
    for name in names:
        tau_a, tau_r, radius = name.split("_")
        rule = Threshold(float(tau_a)) if tau_r == "None" else LocalLeap(float(tau_a), float(tau_r), int(radius))
        assert np.array_equal(rule(confidence, masked).numpy(), recorded[name]), name


def test_anchors_at_both_ends_and_without():
    anchors = torch.tensor([[True, False, False, False, False, False, True], [False] * 7])
    assert near(anchors, 2).tolist() == [[True, True, True, False, True, True, True], [False] * 7]
    assert near(anchors, 99).tolist() == [[True] * 7, [False] * 7]
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    for rule in (LocalLeap(), Threshold(), FixedCount(2), Schedule(2)):
        assert not rule(torch.ones(1, 3, dtype=torch.float64), nobody).any()


@given(n=st.integers(1, 40), steps=st.integers(1, 40))
def test_a_schedule_spreads_a_block_evenly(n, steps):
    """LLaDA: floor(n / S) tokens a call and one more in the first n mod S calls."""
    confidence = torch.from_numpy(np.random.default_rng(n).random((1, n)))
    masked, counts = torch.ones(1, n, dtype=torch.bool), []
    for step in range(steps):
        commit = Schedule(steps)(confidence, masked, step)
        counts.append(int(commit.sum()))
        masked = masked & ~commit
    assert counts == [n // steps + (step < n % steps) for step in range(steps)]


def test_ties_go_to_the_left():
    same = torch.full((1, 5), 0.5, dtype=torch.float64)
    masked = torch.tensor([[False, True, True, True, True]])
    assert positions(FixedCount(1)(same, masked)) == [{1}]
    assert positions(FixedCount(3)(same, masked)) == [{1, 2, 3}]
    assert positions(Threshold(0.9)(same, masked)) == [{1}]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_thresholds_lie_between_zero_and_one(value):
    with pytest.raises(ValueError, match="anchor_threshold"):
        LocalLeap(anchor_threshold=value)
    with pytest.raises(ValueError, match="relaxed_threshold"):
        LocalLeap(relaxed_threshold=value)
    with pytest.raises(ValueError, match="threshold"):
        Threshold(value)


def test_refusals():
    with pytest.raises(ValueError, match="relaxed_threshold must be at most anchor_threshold"):
        LocalLeap(0.7, 0.8)
    with pytest.raises(ValueError, match="radius"):
        LocalLeap(radius=-1)
    with pytest.raises(ValueError, match="tokens"):
        FixedCount(0)
    with pytest.raises(ValueError, match="steps must be a multiple of the 4 blocks"):
        Schedule.of(6, 32, 8)
    assert Schedule.of(8, 32, 8) == Schedule(2)


def test_confidence_is_of_the_clean_softmax():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    plain = predict(logits, 6)
    assert torch.equal(logits, before)
    p = logits[..., :6].double().softmax(-1)
    torch.testing.assert_close(plain.confidence, p.amax(-1))
    assert torch.equal(plain.tokens, p.argmax(-1))
    drawn = predict(logits, 6, temperature=3.0, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.confidence, p.gather(-1, drawn.tokens[..., None])[..., 0])
    assert not torch.equal(drawn.tokens, plain.tokens)


def test_gumbel_noise_draws_from_the_tempered_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, 50.0]).expand(1, 40_000, 4)
    drawn = predict(logits, 3, temperature=0.5, generator=torch.Generator().manual_seed(2)).tokens
    share = torch.bincount(drawn[0], minlength=4).double() / 40_000
    torch.testing.assert_close(share[:3], torch.tensor([0.0, 2.0, 4.0]).double().softmax(0), atol=0.01, rtol=0)
    assert share[3] == 0  # the mask, however much the model likes it


def test_other_confidences_are_comparable():
    sure, unsure = torch.tensor([[[50.0, 0.0, 0.0, 0.0]]]), torch.zeros(1, 1, 4)
    for measure in ("prob", "margin", "entropy"):
        assert float(predict(sure, 3, measure=measure).confidence) == pytest.approx(1, abs=1e-9)
    assert float(predict(unsure, 3, measure="margin").confidence) == 0
    assert float(predict(unsure, 3, measure="entropy").confidence) == pytest.approx(1 - np.log(3) / np.log(4))
    chance = predict(torch.zeros(2, 500, 4), 3, measure="random", generator=torch.Generator().manual_seed(3)).confidence
    assert 0 <= float(chance.min()) < float(chance.max()) < 1


def test_half_precision_does_not_round_up_to_a_threshold():
    logits = torch.tensor([[[np.log(0.8999 / 0.1001), 0.0, 0.0]]], dtype=torch.float32)
    assert float(predict(logits, 2).confidence) == pytest.approx(0.8999, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_named(bad):
    logits = torch.zeros(1, 2, 3)
    logits[0, 1, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        predict(logits, 2)
