"""Tokens, language models from folders and trained in place, and the adaptive modules by themselves."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from locally.design.bidirectional import (
    PROTEIN,
    AdaptiveRate,
    AdaptiveWeight,
    BIBDesigner,
    MaskedLM,
    ModelFolderError,
    MotifLandscape,
    PretrainedLM,
    RidgeEnsemble,
    SequenceSpace,
    adaptive_lr,
    embed,
    hamming,
    initial_logits,
    pretrain,
    tokens,
)
from locally.design.bidirectional.adaptive import Adam
from locally.design.bidirectional.encoder import UNMASKED_SHARE
from locally.design.bidirectional.pretrained import read_encoder, read_json, read_vocabulary
from locally.design.bidirectional.relaxation import soft_words
from locally.design.bidirectional.sequences import words
from locally.errors import MissingExtra

# Sequences and tokens


@given(st.lists(st.text("ACGT", min_size=5, max_size=5), min_size=1, max_size=8))
def test_letters_survive_the_way_there_and_back(sequences):
    space = SequenceSpace("dna", 5)
    assert space.decode(space.encode(sequences)) == sequences
    indices = space.encode(sequences)
    np.testing.assert_array_equal(space.encode(indices), indices)
    naive = [[sum(a != b for a, b in zip(s, t)) for t in sequences] for s in sequences]
    np.testing.assert_array_equal(hamming(indices, indices), naive)


def test_alphabets_have_their_own_order_and_bad_ones_are_named():
    assert SequenceSpace("protein", 3).alphabet == PROTEIN
    assert SequenceSpace("TCGA", 2).encode(["TA"]).tolist() == [[0, 3]]
    for alphabet in ("A", "AAC", ""):
        with pytest.raises(ValueError, match="alphabet"):
            SequenceSpace(alphabet, 4)
    with pytest.raises(ValueError, match="length"):
        SequenceSpace("dna", 0)
    with pytest.raises(ValueError, match="letter 'é'"):
        SequenceSpace("dna", 2).encode(["Cé"])


@given(seed=st.integers(0, 1000), k=st.sampled_from([1, 2, 3]), letters=st.sampled_from([4, 20]))
def test_tokens_are_one_hot_with_the_gradient_of_the_soft_ones(seed, k, letters):
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(0, letters, (3, 6), generator=generator)
    theta = initial_logits(sequences, letters, generator=generator, dtype=torch.float64)
    assert torch.equal(theta.argmax(2), sequences)
    assert torch.allclose(
        theta.sort(2).values, theta[:1].sort(2).values.expand_as(theta)
    )  # one matrix, entries swapped
    hard = tokens(theta, k)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    expected = torch.as_tensor(words(sequences.numpy(), letters, k))
    assert torch.equal(hard.argmax(2), expected)
    soft = soft_words(theta.softmax(-1), k)
    torch.testing.assert_close(soft.sum(2), torch.ones_like(soft[..., 0]))
    weights = torch.randn(hard.shape, generator=generator, dtype=torch.float64)
    gradients = []
    for make in (lambda t: tokens(t, k), lambda t: soft_words(t.softmax(-1), k)):
        t = theta.clone().requires_grad_()
        gradients.append(torch.autograd.grad((make(t) * weights).sum(), t)[0])
    torch.testing.assert_close(*gradients)


def test_words_longer_than_the_sequence_are_refused():
    with pytest.raises(ValueError, match="k-mers of 3"):
        words(np.zeros((2, 2), np.int64), 4, 3)


# Models from folders; the expected hidden states are those of transformers 5.24 for the same files


@pytest.mark.parametrize(("name", "alphabet", "kmer"), [
    ("dnabert", "dna", 3), ("esm2", "protein", 1), ("esm1b", "protein", 1),
])  # fmt: skip
def test_hidden_states_and_soft_path_are_those_of_transformers(golden, name, alphabet, kmer):
    folder = golden / "29-bib" / name
    encoder, table = read_encoder(folder, read_json(folder, "config.json"))
    expected = np.load(folder / "expected.npz")
    hidden = encoder(table[torch.as_tensor(expected["ids"])])
    np.testing.assert_allclose(hidden.detach().numpy(), expected["hidden"], atol=1e-5)

    model = PretrainedLM.from_folder(folder, alphabet)
    assert model.kmer == kmer
    assert not any(p.requires_grad for p in model.parameters())
    space = SequenceSpace(alphabet, expected["ids"].shape[1] - 2 + kmer - 1)
    names = {i: token for token, i in read_vocabulary(folder).items()}
    inner = [[names[i] for i in row[1:-1]] for row in expected["ids"].tolist()]
    if kmer == 1:
        rows = space.encode(["".join(row) for row in inner])
        pooled = embed(model, rows, space.letters)
        np.testing.assert_allclose(pooled.numpy(), expected["hidden"][:, 1:-1].mean(1), atol=1e-5)
    else:  # the stored tokens do not overlap as k-mers of one sequence would: feed them directly
        order = {"".join("ACGT"[i] for i in word): n for n, word in enumerate(np.ndindex(4, 4, 4))}
        numbers = torch.tensor([[order[word] for word in row] for row in inner])
        pooled = model(torch.nn.functional.one_hot(numbers, 64).float())
        np.testing.assert_allclose(pooled.numpy(), expected["hidden"][:, 1:-1].mean(1), atol=1e-5)


def test_a_folder_guides_a_design(golden):
    model = PretrainedLM.from_folder(golden / "29-bib" / "dnabert", "dna")
    space = SequenceSpace("dna", 8)
    sequences = space.random(60, np.random.default_rng(0))
    scores = (sequences == 2).sum(1).astype(float)
    designer = BIBDesigner(model, space, n_designs=6, steps=40, random_state=0).fit(sequences, scores)
    found = designer.design()
    assert found.proxy.mean() > np.sort(designer.predict(sequences))[-6:].mean()
    assert (found.distance > 0).any()


def tiny_folder(tmp_path, golden, name="esm2"):
    folder = tmp_path / name
    shutil.copytree(golden / "29-bib" / name, folder)
    return folder


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shards_and_tokenizer_json_are_read_alike(tmp_path, golden):
    folder = tiny_folder(tmp_path, golden)
    whole = PretrainedLM.from_folder(folder, "protein")
    weights = load_file(folder / "model.safetensors")
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, tensor) in enumerate(weights.items()):
        parts[list(parts)[i % 2]][name] = tensor
    for name, part in parts.items():
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    vocabulary = read_vocabulary(folder)
    (folder / "vocab.txt").unlink()
    for vocab in (vocabulary, [[token, 0.0] for token in vocabulary]):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
        again = PretrainedLM.from_folder(folder, "protein")
        x = torch.eye(20)[None]
        assert torch.equal(again(x), whole(x))


def test_esm_without_token_dropout_is_not_rescaled(tmp_path, golden):
    folder = tiny_folder(tmp_path, golden)
    scaled = PretrainedLM.from_folder(folder, "protein")
    edit(folder, token_dropout=False)
    plain = PretrainedLM.from_folder(folder, "protein")
    assert (plain.encoder.shape.token_scale, scaled.encoder.shape.token_scale) == (1.0, UNMASKED_SHARE)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "no JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "no object"),
        (lambda f: (f / "vocab.txt").unlink(), "neither vocab.txt"),
        (lambda f: (f / "vocab.txt").write_text("A\nC\n"), "no token 'D'"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "no safetensors file"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle, which is never opened"),
        (lambda f: edit(f, hidden_act="swiglu"), "hidden_act"),
        (lambda f: edit(f, num_attention_heads=5), "does not divide"),
        (lambda f: edit(f, position_embedding_type="relative_key"), "position_embedding_type"),
        (lambda f: edit(f, num_hidden_layers=3), "do not fit config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "esm"}'), "lacks hidden_size"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, golden, spoil, message):
    folder = tiny_folder(tmp_path, golden)
    spoil(folder)
    with pytest.raises(ModelFolderError, match=message):
        PretrainedLM.from_folder(folder, "protein")


def test_other_models_ask_for_the_extra(tmp_path, golden, monkeypatch):
    folder = tiny_folder(tmp_path, golden)
    edit(folder, model_type="t5")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"locally\[llm\]"):
        PretrainedLM.from_folder(folder, "protein")
    with pytest.raises(ModelFolderError, match='backend="own"'):
        PretrainedLM.from_folder(golden / "29-bib" / "esm2", "protein", backend="transformers")


def test_through_transformers_where_it_is_installed(golden):
    pytest.importorskip("transformers", reason='needs the extra "llm"')
    own = PretrainedLM.from_folder(golden / "29-bib" / "dnabert", "dna")
    theirs = PretrainedLM.from_folder(golden / "29-bib" / "dnabert", "dna", backend="transformers")
    x = torch.eye(64)[torch.randint(0, 64, (3, 7))]
    torch.testing.assert_close(theirs(x), own(x), atol=1e-5, rtol=1e-4)


def test_too_long_a_sequence_for_learnt_positions_is_refused(golden):
    model = PretrainedLM.from_folder(golden / "29-bib" / "esm1b", "protein")
    with pytest.raises(ValueError, match="at most"):
        model(torch.eye(20)[None, :18])


# Trained in place


def test_pretraining_beats_chance_and_freezes():
    land = MotifLandscape(0)
    model = MaskedLM(4, width=16, hidden=16, generator=torch.Generator().manual_seed(0))
    corpus = land.draw(3000, 0.05, np.random.default_rng(0))
    losses = pretrain(model, land.space, corpus, steps=150, batch=64, rate=1e-2, rng=np.random.default_rng(0))
    assert losses[0] > np.log(4) - 0.1  # chance
    assert np.mean(losses[-20:]) < 1.2
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    again = MaskedLM(4, width=16, hidden=16, generator=torch.Generator().manual_seed(0))
    seen = []
    short = pretrain(
        again, land.space, corpus, steps=150, batch=64, rate=1e-2, rng=np.random.default_rng(0),
        callback=lambda step, loss: seen.append(step) or step == 3,
    )  # fmt: skip
    assert short == losses[:3]
    assert seen == [1, 2, 3]


# Adaptive modules


def test_a_useless_auxiliary_model_leaves_the_rate_alone_and_bounds_hold():
    rate = AdaptiveRate()
    direction = torch.tensor([[1.0, -1.0]])
    assert rate(torch.zeros(1, 2), direction).item() == pytest.approx(0.1)
    assert rate(-1e6 * direction, direction).item() == 0.5
    assert rate(1e6 * direction, direction).item() == pytest.approx(1e-4)


@given(seed=st.integers(0, 1000))
def test_the_rate_climbs_the_auxiliary_score_of_the_next_point(seed):
    """It differs from the base by the outer step times d/d eta of f_aux(theta - eta d) at eta = 0."""
    generator = torch.Generator().manual_seed(seed)
    theta, direction = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    score = lambda x: torch.sin(x).sum(1)
    eta = adaptive_lr(score, theta, direction, base=0.1, step=0.01, bounds=(1e-9, 10.0))
    slope = (score(theta - 1e-6 * direction) - score(theta + 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(eta, (0.1 + 0.01 * slope).clamp(1e-9, 10.0), atol=1e-8, rtol=0)


def test_adaptive_rate_lets_plain_ascent_arrive_earlier():
    """Any designer that ascends by gradient: here a parabola, judged by itself."""
    target = torch.linspace(-5, 5, 6, dtype=torch.float64)[None]
    score = lambda x: -(x - target).square().sum(1)
    distance = {}
    for adaptive in (False, True):
        theta = torch.zeros_like(target)
        adam = Adam.like(theta)
        for _ in range(20):
            direction = adam.direction(2 * (theta - target))
            eta = adaptive_lr(score, theta, direction) if adaptive else torch.tensor([0.1])
            theta = theta - eta[:, None] * direction
        distance[adaptive] = float((theta - target).norm())
    assert distance[True] < 0.8 * distance[False]


def test_gamma_goes_where_the_auxiliary_score_rises():
    weight = AdaptiveWeight()
    forward, backward = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for aux, expected in ((torch.tensor([[-1.0, 0.0]]), 0.6), (torch.tensor([[0.0, -1.0]]), 0.4)):
        gamma = torch.tensor([0.5])
        moved = weight.update(gamma, Adam.like(gamma), aux, forward, backward)  # descending forward raises aux, or not
        assert moved.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveRate(base=0.0), "base"),
        (lambda: AdaptiveRate(bounds=(0.2, 0.5)), "bounds"),
        (lambda: AdaptiveWeight(start=2.0), "start"),
        (lambda: adaptive_lr(lambda x: x.sum(1), torch.zeros(2, 3), torch.zeros(3, 2)), "direction"),
        (lambda: adaptive_lr(lambda x: x.sum(), torch.zeros(2, 3), torch.zeros(2, 3)), "f_aux"),
        (lambda: adaptive_lr(lambda x: x.sum(1), torch.full((2, 3), torch.nan), torch.zeros(2, 3)), "theta"),
        (lambda: RidgeEnsemble(0), "members"),
    ],
)
def test_impossible_modules_are_named(make, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_ensemble_is_ridge_with_an_intercept(without_shape_checks):
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    for n, p in ((50, 4), (20, 40)):
        F, y = rng.standard_normal((n, p)), rng.standard_normal(n) + 3
        ours = RidgeEnsemble(1, 0.01).fit(torch.as_tensor(F), torch.as_tensor(y), generator=torch.Generator())
        theirs = Ridge(alpha=0.01 * n).fit(F, y)
        np.testing.assert_allclose(ours.coefficients, theirs.coef_, atol=1e-9)
        assert ours.intercept == pytest.approx(theirs.intercept_)
