"""The experiment of arXiv 2503.09657 at quick scale, its other studies on small sizes, and its wiring at full size."""

import json
import math

import numpy as np
import pytest
import torch

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import tyr_the_pruner as paper
from locally.sequence.structured_pruning import open_network
from tests.sequence.pruning_models import small_checkpoint, small_model, small_text_file, small_tokenizer

CARD = next(p for p in load() if p.slug == "tyr-the-pruner")
SMALL = paper.Study(
    (0.25, 0.5),
    decisive=(0.5,),
    models=1,
    layers=2,
    hidden=32,
    neurons=32,
    heads=4,
    steps=4,
    length=32,
    calibration=4,
    search_windows=4,
    held_out=4,
    iterations=1,
    generations=2,
    offspring=4,
    survivors=(2, 1),
    stages=(1, 2),
)


@pytest.fixture(scope="module")
def small(shapes_unchecked) -> Run:
    run = Run(scale="default", seeds=(0, 1))
    with shapes_unchecked():
        paper.one_model(run, (0, (0, 1)), study=SMALL)
        paper.figure(run)
    return run


def test_quick_scale_bears_out_what_it_can_decide(quick):
    verdict = judge(CARD.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert [f.claim.metric for f in decided] == ["layer output error / that of magnitude pruning"]
    assert verdict.outcome is Outcome.HOLDS


def test_every_other_claim_finds_its_measures(small):
    known = {(m.method, m.metric) for m in small.measures}
    for claim in CARD.claims:
        assert (claim.method, claim.metric) in known or claim.scale == "paper"


def test_all_methods_at_all_sparsities(small):
    measured = [m for m in small.measures if m.metric == "perplexity"]
    methods = {paper.TYR, *paper.BASELINES, "dense"}
    assert {(m.method, m.setting["sparsity"]) for m in measured if m.seed == 0} == {
        (name, s) for name in methods for s in (0.25, 0.5)
    }
    assert {m.setting["sparsity"] for m in measured if m.seed == 1} == {0.5}
    assert all(math.isfinite(m.value) for m in measured)
    (drawn,) = small.figures
    assert drawn.svg.startswith("<svg")


def test_budget_is_kept(small):
    for kind in ("heads", "neurons"):
        shares = [m.value for m in small.measures if m.metric == f"share of {kind} removed" and m.seed == 1]
        assert np.mean(shares) == pytest.approx(0.5)


def test_text_is_split_without_overlap():
    training, held_out = paper.text()
    assert len(held_out) / len(training) == pytest.approx(1 / 9, rel=0.05)
    assert 0 <= int(training.min()) <= int(training.max()) < paper.VOCABULARY
    whole = bytes(training.tolist())
    assert bytes(held_out[: paper.CHUNK].tolist()) not in whole


def test_gram_matrices_are_of_the_right_inputs():
    model = small_model()
    ids = torch.arange(32).view(2, 16)
    found = paper.gram_matrices(open_network(model), ids)
    seen = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    torch.testing.assert_close(found["blocks.1.neurons"], seen[0].mT @ seen[0], rtol=1e-4, atol=1e-5)


def test_accuracy_is_of_the_likeliest_answer(tmp_path):
    model, tokenizer = small_model(), small_tokenizer()
    rng = np.random.default_rng(0)
    lines, right = [], []
    for _ in range(12):
        words = lambda count: " ".join(f"w{i}" for i in rng.integers(0, 40, count))
        context, choices = words(rng.integers(1, 6)), [words(rng.integers(1, 4)) for _ in range(3)]
        scores = []
        for choice in choices:
            before, after = (tokenizer(t)["input_ids"] for t in (context, choice))
            with torch.no_grad():
                logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(after)))
        answer = int(rng.integers(3))
        right.append(int(np.argmax(scores)) == answer)
        lines.append(json.dumps({"context": context, "choices": choices, "answer": answer}))
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    assert paper.accuracy(open_network(model), tokenizer, tmp_path / "task.jsonl", None, bucket=8) == np.mean(right)


def test_full_size_study_on_small_files(tmp_path, without_shape_checks):
    small_checkpoint(tmp_path / paper.CHECKPOINT)
    small_text_file(tmp_path / paper.TEXT)
    (tmp_path / "tasks").mkdir()
    line = json.dumps({"context": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 0})
    for name in ("arc", "boolq"):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(f"{line}\n{line.replace('0}', '1}')}\n")
    settings = {"iterations": 1, "generations": 1, "offspring": 2, "survivors": (1,), "tokens_per_stage": (32,)}
    study = paper.FullSize(length=16, sequences=12, settings=tuple(settings.items()))
    run = Run(scale="paper", seeds=(0,), data=tmp_path, scratch=tmp_path / "scratch")
    paper.full_size(run, study)
    claim = next(c for c in CARD.claims if c.scale == "paper")
    (measure,) = (m for m in run.measures if m.metric == claim.metric)
    assert measure.method == claim.method
    assert {m.metric for m in run.measures if m.method == "dense"} == {"accuracy, arc", "accuracy, boolq"}
    with pytest.raises(MissingData, match=r"Llama-3\.1-70B"):
        paper.experiment(Run(scale="paper"))
