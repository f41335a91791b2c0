"""The experiment at quick scale, its text and scores, the full-size study's wiring on a tiny checkpoint."""

import json
import shutil

import pytest
import torch

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import liger as paper
from locally.papers.liger import ANSWER_WEIGHT, FILLERS, LIGER, ORIGINAL, QUESTION, WINDOW, Study, Text
from tests.sequence.test_gated_linearization_models import original
from tests.sequence.test_gated_linearization_recovery import tokenizer

TINY = Study(
    contexts=(32, 64),
    timed_tokens=2,
    length=32,
    hidden=16,
    teacher_steps=3,
    recovery_steps=3,
    batch=4,
    tested=8,
    longer=(32, 64),
)


@pytest.fixture(scope="module")
def card():
    (found,) = (p for p in load() if p.slug == "liger")
    return found


@pytest.fixture(scope="module")
def tiny(shapes_unchecked) -> Run:
    run = Run(scale="default", seeds=(100, 101))
    with shapes_unchecked():
        paper.carry_out(run, TINY)
    return run


def test_quick_scale_decides_the_decoding_claims(card, without_shape_checks):
    run = Run(scale="quick", seeds=(100,))
    paper.experiment(run)
    verdict = judge(card.claims, run.measures, Scale.QUICK)
    decided = {f.claim.metric: f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE}
    assert decided["decoding memory at 16384 tokens / at 256 tokens"].estimate == 1
    assert decided["time per token at 16384 tokens / at 256 tokens"].estimate > 0
    grown = [m for m in run.measures if m.method == ORIGINAL and "decoding memory at" in m.metric]
    assert grown[0].value > 32


def test_every_default_claim_finds_its_figure(card, tiny):
    recorded = {(m.method, m.metric) for m in tiny.measures}
    for claim in card.claims:
        if claim.scale is Scale.DEFAULT:
            assert (claim.method, claim.metric) in recorded, claim.statement
    assert [figure.name for figure in tiny.figures] == ["length"]


def test_the_perplexity_claim_is_the_recorded_ratio(tiny):
    value = {
        (m.method, m.seed): m.value
        for m in tiny.measures
        if m.metric == "perplexity" and m.setting["length"] == TINY.length
    }
    ratios = [m for m in tiny.measures if m.metric == "perplexity / teacher's perplexity, recall task"]
    assert {m.method for m in ratios} == {LIGER, WINDOW}
    for m in ratios:
        assert m.value == pytest.approx(value[m.method, m.seed] / value[ORIGINAL, m.seed])


def test_questions_are_beyond_the_window_and_answered_by_the_key():
    text = Text(torch.Generator().manual_seed(0))
    for length in (64, 256):
        examples = text.draw(50, length)
        key = examples.tokens[:, 0]
        assert bool(((key >= FILLERS) & (key < QUESTION)).all())
        at = (examples.tokens == QUESTION).nonzero()
        assert len(at) == 150
        study = Study()
        assert int(at[:, 1].min()) > 2 * (study.window - 1)  # two layers see no further back
        assert torch.equal(examples.tokens[at[:, 0], at[:, 1] + 1], key[at[:, 0]])
        labels, weights = examples.targets()
        assert torch.equal(weights == ANSWER_WEIGHT, (labels >= FILLERS) & (labels < QUESTION))


def test_the_chain_has_its_transitions():
    text = Text(torch.Generator().manual_seed(1))
    tokens = text.draw(400, 128).tokens[:, 40:60]  # between two questions
    counts = torch.zeros(FILLERS, FILLERS)
    for a, b in zip(tokens[:, :-1].flatten().tolist(), tokens[:, 1:].flatten().tolist()):
        if a < FILLERS and b < FILLERS:
            counts[a, b] += 1
    seen = counts / counts.sum(1, keepdim=True)
    assert bool(((seen - text.transitions).abs().max() < 0.2) & ((seen - text.transitions).abs().mean() < 0.03))


def test_scores_of_a_model_that_knows_the_chain():
    text = Text(torch.Generator().manual_seed(2))
    examples = text.draw(40, 64)

    class Knows(torch.nn.Linear):  # has a device, which is asked for
        def forward(self, tokens, use_cache):
            logits = torch.full((*tokens.shape, QUESTION + 1), -30.0)
            state = tokens.clamp(max=FILLERS - 1)
            logits[..., :FILLERS] = text.transitions[state].log()
            asked = tokens == QUESTION
            logits[asked] = torch.nn.functional.one_hot(tokens[:, :1].expand_as(tokens)[asked], QUESTION + 1) * 99.0
            return type("Out", (), {"logits": logits})

    perplexity, accuracy = paper.scores(Knows(1, 1), examples)
    assert accuracy == 1.0
    entropy = -(text.transitions * text.transitions.log()).sum(1)
    assert torch.e ** float(entropy.min()) < perplexity < FILLERS


def test_the_full_size_study_runs_on_a_tiny_checkpoint(tmp_path, without_shape_checks):
    folder = tmp_path / "Meta-Llama-3-8B"
    original(vocab_size=40, max_position_embeddings=64).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    records = [{"instruction": "abc", "input": "", "output": "def"}] * 40
    (tmp_path / "alpaca_data_cleaned.json").write_text(json.dumps(records))
    (tmp_path / "tasks").mkdir()
    question = json.dumps({"query": "abc", "choices": ["d", "ef"], "gold": 0})
    for name in paper.TASKS:
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(f"{question}\n{question}\n")
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.full_size(run)
    means = {m.method: m.value for m in run.measures if m.metric.startswith("mean score over six")}
    assert set(means) == {LIGER, ORIGINAL}
    assert all(0 <= value <= 100 for value in means.values())
    assert {m.setting["task"] for m in run.measures if m.metric == "score in percent"} == set(paper.TASKS)

    (tmp_path / "tasks" / "mmlu.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(MissingData, match=r"line 1 of .*mmlu"):
        paper.questions(tmp_path / "tasks" / "mmlu.jsonl")
    shutil.rmtree(tmp_path / "tasks")
    with pytest.raises(MissingData, match="piqa"):
        paper.full_size(run)


def test_log_likelihoods_choose(without_shape_checks):
    made = tokenizer()

    class Prefers(torch.nn.Linear):  # has a device, which is asked for
        def forward(self, ids, use_cache):
            logits = torch.zeros(*ids.shape, 40)
            logits[..., made("b")["input_ids"][0]] = 3.0  # b after anything
            return type("Out", (), {"logits": logits})

    asked = [("a", ["b", "c"], 0), ("a", ["c", "b"], 1), ("a", ["c", "bb"], 1)]
    assert paper.accuracy(Prefers(1, 1), made, asked, per_byte=False) == 1.0
    assert paper.accuracy(Prefers(1, 1), made, asked, per_byte=True) == 1.0


def test_scales_have_their_sizes(monkeypatch):
    handed = {}
    monkeypatch.setattr(paper, "full_size", lambda run: None)
    for scale in ("quick", "default", "paper"):
        monkeypatch.setattr(paper, "carry_out", lambda run, study, scale=scale: handed.update({scale: study}))
        paper.experiment(Run(scale=scale, seeds=(0,)))
    assert not handed["quick"].learns
    assert handed["default"].learns
    assert handed["paper"].timed_tokens > handed["default"].timed_tokens
    assert {s.contexts[0] for s in handed.values()} == {256}
    assert {s.contexts[-1] for s in handed.values()} == {16384}
