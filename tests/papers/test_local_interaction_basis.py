"""The experiment at quick scale, its networks, and the full-size study on small files of the same format."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import local_interaction_basis as paper
from locally.tangent.interaction_basis import addition_transformer, load_addition_transformer


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (p for p in load() if p.slug == "local-interaction-basis")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    halves, components = decided
    assert components.estimate > 0.2
    # coincidences of equally important features decide how near to the claimed thousandth two seeds come
    assert halves.estimate < components.estimate / 20


def test_what_is_recorded(quick):
    digits = {(m.method, m.metric, m.setting.get("cut")) for m in quick.measures if m.setting.get("network")}
    for method in paper.BASES:
        for cut in paper.MLP_CUTS:
            assert (method, "edges required", cut) in digits
    ratios = [m for m in quick.measures if m.metric == "edges required / PCA's, first layers of a digit classifier"]
    assert {m.seed for m in ratios} == {0, 1}
    assert all(0 < m.value < 0.5 for m in ratios)
    assert [f.name for f in quick.figures] == ["independent-halves", "edge-ablation", "interaction-graphs"]


def test_same_seed_same_counts(without_shape_checks):
    def measures():
        run = Run(scale="quick", seeds=(5,))
        paper.digits(run, 5, 0)
        return run.measures

    assert measures() == measures()


def test_addition_tables_and_splits():
    pairs, sums = paper.addition_table(5)
    assert pairs.shape == (25, 2)
    assert sums[pairs.tolist().index([3, 4])] == 2
    train, test = paper.split_pairs(113, 0.3, seed=0)
    assert len(train) == 3830
    assert sorted(torch.cat([train, test]).tolist()) == list(range(113**2))


def write_transformer(path, p=7):
    """A trained one in the layout that the study reads."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = addition_transformer(p, width=16, heads=2, head_width=8, hidden=32)
    pairs, sums = paper.addition_table(p)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(F.pad(pairs, (0, 1), value=p)), sums).backward()
        optimizer.step()
    w = model.state_dict()
    qkv = w["attention.0.project_in.weight"].view(3, 2, 8, 16).transpose(2, 3)
    biases = w["attention.0.project_in.bias"].view(3, 2, 8)
    tensors = {
        "embed.W_E": w["embed.tokens"],
        "pos_embed.W_pos": w["embed.positions"],
        "unembed.W_U": w["unembed.weight"].T,
        "unembed.b_U": w["unembed.bias"],
        **{f"blocks.0.attn.W_{n}": qkv[i] for i, n in enumerate("QKV")},
        **{f"blocks.0.attn.b_{n}": biases[i] for i, n in enumerate("QKV")},
        "blocks.0.attn.W_O": w["attention.0.project_out.weight"].T.reshape(2, 8, 16),
        "blocks.0.attn.b_O": w["attention.0.project_out.bias"],
        "blocks.0.mlp.W_in": w["mlp.0.weight"].T,
        "blocks.0.mlp.b_in": w["mlp.0.bias"],
        "blocks.0.mlp.W_out": w["mlp.2.weight"].T,
        "blocks.0.mlp.b_out": w["mlp.2.bias"],
    }
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return model


def test_the_authors_transformers_are_read_and_compared(tmp_path, monkeypatch, without_shape_checks):
    for i in range(5):
        model = write_transformer(tmp_path / "modular-addition" / f"transformer_p113_seed{i}.safetensors")
    read = load_addition_transformer(tmp_path / "modular-addition" / "transformer_p113_seed4.safetensors")
    tokens = torch.tensor([[1, 2, 7]])
    torch.testing.assert_close(read(tokens), model(tokens))
    small = lambda run, i, model: original(run, i, model, modulus=7)
    original = paper.authors_transformer
    monkeypatch.setattr(paper, "authors_transformer", small)
    run = Run(scale="paper", data=tmp_path)
    paper.authors_transformers(run)
    metrics = {m.metric for m in run.measures}
    assert "edges required / PCA's, first section, summed over five transformers" in metrics
    compared = [m for m in run.measures if m.metric == "edges required / the authors' count, first section"]
    assert {(m.method, m.seed) for m in compared} == {(method, i) for method in paper.BASES for i in range(5)}
    with pytest.raises(MissingData, match="authors' transformer"):
        paper.authors_transformers(Run(scale="paper"))


def test_cifar_is_read_from_a_zip_of_images(tmp_path, without_shape_checks):
    rng = np.random.default_rng(0)
    (tmp_path / "cifar10").mkdir()
    with zipfile.ZipFile(tmp_path / "cifar10" / "cifar10.zip", "w") as file:
        for part, count in (("train", 30), ("test", 10)):
            for label, name in enumerate(("bird", "cat")):
                for i in range(count):
                    pixels = np.clip(rng.normal(60 + 130 * label, 20, (6, 6, 3)), 0, 255).astype(np.uint8)
                    data = io.BytesIO()
                    Image.fromarray(pixels).save(data, "jpeg")
                    file.writestr(f"{part}/{name}/{i:04}.jpg", data.getvalue())
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.cifar_classifier(run)
    (ratio,) = (m.value for m in run.measures if m.metric == "edges required / PCA's, CIFAR-10")
    assert 0 < ratio < 5
    (accuracy,) = {m.value for m in run.measures if m.metric == "accuracy without ablation"}
    assert accuracy > 0.9
    with pytest.raises(ValueError, match="no images"):
        paper.read_images(tmp_path / "cifar10" / "cifar10.zip", "validation")
    skipped = Run(scale="paper", seeds=(0,), data=tmp_path / "cifar10")
    paper.cifar_classifier(skipped)
    assert not skipped.measures


def test_paper_scale_runs_the_full_size_studies(monkeypatch, without_shape_checks):
    called = []
    for name in ("authors_transformers", "cifar_classifier"):
        monkeypatch.setattr(paper, name, lambda run, name=name: called.append(name))
    monkeypatch.setattr(paper, "all_networks", lambda *_: ({}, {"digit classifier": [{}]}))
    for name in ("halves_figure", "curves_figure", "graph_figure"):
        monkeypatch.setattr(paper, name, lambda *_: None)
    paper.experiment(Run(scale="paper", seeds=(0,)))
    assert called == ["authors_transformers", "cifar_classifier"]


@pytest.mark.slow
@pytest.mark.skipif("LOCALLY_DATA" not in os.environ, reason="LOCALLY_DATA names no folder with modular-addition/")
def test_the_authors_network_has_the_authors_accuracy():
    path = Path(os.environ["LOCALLY_DATA"]) / "modular-addition" / "transformer_p113_seed0.safetensors"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    pairs, sums = paper.addition_table(113)
    _, test = paper.split_pairs(113, 0.3, seed=0)
    with torch.no_grad():
        found = load_addition_transformer(path)(F.pad(pairs[test], (0, 1), value=113)).argmax(1)
    assert float((found == sums[test]).double().mean()) == pytest.approx(0.9995525226535407, abs=1e-9)
