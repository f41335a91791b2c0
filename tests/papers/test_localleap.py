"""The experiment at quick scale, its task against the definition, the full-size study's wiring on small checkpoints."""

import json

import pytest
import torch

from locally import catalogue
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import localleap as paper
from locally.papers.localleap import FAST, GREEDY, OURS, RULES, Study
from locally.sequence.diffusion_decoding import build, save

transformers = pytest.importorskip("transformers")

TINY = Study(2, 2, width=16, layers=1, steps=3, prompts=4, maxima_steps=2)


def value(run, method, metric, seed=0):
    (found,) = (m.value for m in run.measures if (m.method, m.metric, m.seed) == (method, metric, seed))
    return found


def test_quick_scale_bears_out_what_it_can_decide(quick):
    card = catalogue.find(catalogue.load(), "localleap")
    decided = [
        f for f in judge(card.claims, quick.measures, Scale.QUICK).findings if f.outcome is not Outcome.NEEDS_SCALE
    ]
    assert [f.outcome for f in decided] == [Outcome.HOLDS]
    recorded = {(m.method, m.metric) for m in quick.measures}
    assert {(c.method, c.metric) for c in card.claims if c.scale is not Scale.PAPER} <= recorded
    assert [f.name for f in quick.figures] == ["rules-and-delay"]


def test_the_model_has_learned_and_rules_cost_what_they_say(quick):
    calls = "model calls / response length"
    for seed in (0, 1):
        assert value(quick, GREEDY, "final-answer accuracy", seed) > 0.6
        assert value(quick, GREEDY, calls, seed) == 1
        assert value(quick, "2 tokens per call", calls, seed) == pytest.approx(5 / 9)
        assert value(quick, "8 tokens per call", calls, seed) == pytest.approx(2 / 9)
        assert value(quick, GREEDY, "share of responses equal to those of one token per call", seed) == 1
        assert 1 / 9 <= value(quick, OURS, calls, seed) <= value(quick, FAST, calls, seed) + 1 / 9


def test_the_derived_measures_follow_from_the_others(quick):
    calls, accuracy = "model calls / response length", "final-answer accuracy"
    ratio = value(quick, OURS, calls) / value(quick, FAST, calls)
    assert value(quick, OURS, "model calls / those of the confidence threshold") == pytest.approx(ratio)
    lost = value(quick, OURS, accuracy) - value(quick, GREEDY, accuracy)
    assert value(quick, OURS, "final-answer accuracy minus that of one token per call") == pytest.approx(lost)


def test_the_default_study_is_the_one_claimed(monkeypatch):
    handed = []
    monkeypatch.setattr(paper, "carry_out", lambda run, study: handed.append(study))
    paper.experiment(Run(scale="default", seeds=(0,)))
    (study,) = handed
    assert (study.numbers, study.largest, study.length, study.prompts) == (8, 5, 24, 150)
    rules = RULES[OURS], RULES[FAST]
    assert (rules[0].anchor_threshold, rules[0].relaxed_threshold, rules[0].radius) == (0.9, 0.75, 4)
    assert rules[1].threshold == 0.9


def test_same_seed_same_records(tmp_path, without_shape_checks):
    def records():
        run = Run(scale="default", seeds=(3,), scratch=tmp_path)
        paper.carry_out(run, TINY)
        return [m for m in run.measures if m.metric != "tokens per second"]

    first = records()
    assert first == records()
    assert {m.method for m in first} == {*RULES, *paper.ABLATIONS}
    cached = {(m.method, m.setting["cache"]) for m in first if m.metric.startswith("running maxima: share")}
    assert cached == {(name, cache) for name in (OURS, GREEDY, FAST) for cache in ("none", "prefix", "dual")}


def test_responses_are_running_sums():
    prompts, responses = paper.draw(Study(4, 5), 20, torch.Generator().manual_seed(0))
    for prompt, response in zip(prompts.tolist(), responses.tolist()):
        *numbers, equals = prompt
        assert equals == paper.EQUALS
        assert all(1 <= a <= 5 for a in numbers)
        assert response[0::3] == numbers
        sums = [10 * tens + ones for tens, ones in zip(response[1::3], response[2::3])]
        assert sums == [sum(numbers[: k + 1]) for k in range(4)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 12.\n#### 1,234\nmore 5", "1234"),
        (r"so \boxed{3} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("first 3 apples, then -4.5.", "-4.5"),
        ("she pays $18.", "18"),
        ("none", "none"),
    ],
)
def test_final_answers_are_found(text, answer):
    assert paper.final_answer(text) == answer


@pytest.fixture
def user_data(tmp_path):
    """Small checkpoints of both families with a tokenizer of single words, and two benchmarks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "<eos>", "[MASK]", *"0123456789", "add", "and"]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", eos_token="<eos>", mask_token="[MASK]"
    )
    tokens = {"vocab_size": len(words), "mask_token_id": 2, "eos_token_id": 1}
    llada = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 16, "max_sequence_length": 64}
    dream = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    torch.manual_seed(0)
    families = {"LLaDAModelLM": llada, "DreamModel": dream | {"max_position_embeddings": 64}}
    for name, (family, sizes) in zip(paper.CHECKPOINTS, families.items()):
        model = build({"architectures": [family], **sizes, **tokens})
        save(model, tmp_path / "models" / name, tokenizer=tokenizer)
    questions = [{"question": "add 1 and 2", "answer": "1 + 2\n#### 3"}, {"question": "add 2", "answer": "#### 2"}]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "humaneval.jsonl").write_text(json.dumps({"prompt": "def add", "test": "never run"}) + "\n")
    return tmp_path


def test_the_full_size_study_runs_on_small_checkpoints(user_data):
    run = Run(scale="paper", seeds=(0,), data=user_data)
    paper.full_size(run, gen_length=8, block_length=4, questions=2)
    card = catalogue.find(catalogue.load(), "localleap")
    (claim,) = (c for c in card.claims if c.scale is Scale.PAPER)
    ratios = [m.value for m in run.measures if m.metric == "throughput / that of one token per call"]
    assert len(ratios) == 4
    assert value(run, claim.method, claim.metric, None) == max(ratios)
    graded = [m for m in run.measures if m.metric == "final-answer accuracy"]
    assert {m.setting["benchmark"] for m in graded} == {"gsm8k"}
    assert {m.setting["model"] for m in graded} == set(paper.CHECKPOINTS)
    assert {f"{OURS}, {cache} cache" for cache in ("prefix", "dual")} < {m.method for m in graded}


def test_missing_or_damaged_data_is_named(user_data):
    with pytest.raises(MissingData, match="LLaDA-8B-Instruct"):
        paper.experiment(Run(scale="paper", seeds=(0,)))
    (user_data / "gsm8k.jsonl").write_text('{"question": "no answer"}\n')
    with pytest.raises(MissingData, match=r"gsm8k.jsonl, line 1: no object with question and answer"):
        paper.full_size(Run(scale="paper", seeds=(0,), data=user_data), gen_length=8, block_length=4)
    for file in ("gsm8k.jsonl", "humaneval.jsonl"):
        (user_data / file).unlink()
    with pytest.raises(MissingData, match=r"holds none of gsm8k\.jsonl"):
        paper.full_size(Run(scale="paper", seeds=(0,), data=user_data))
