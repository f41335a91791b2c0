"""The experiment at quick scale, and the full study on small CSV files of the format that it reads."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

import locally.papers.local_function_approximation as paper
from locally.evidence import Claim, MissingData, Outcome, Run, judge


def claims() -> list[Claim]:
    card = Path(paper.__file__).with_suffix(".toml")
    return [Claim.from_dict(c) for c in tomllib.loads(card.read_text())["claims"]]


def write_csv(path: Path, rows: int, *, seed: int, classify: bool) -> None:
    rng = np.random.default_rng(seed)
    X = rng.uniform(0, 50, (rows, 5))
    y = X @ [0.3, -0.2, 0.0, 0.5, 0.1] + 5 * np.sin(X[:, 0] / 10)
    y = (y > 15).astype(float) if classify else y
    path.parent.mkdir(exist_ok=True)
    table = "\n".join(",".join(f"{v:.6g}" for v in row) for row in np.c_[X, y])
    path.write_text(f"Year, BMI ,Alcohol,GDP,Schooling,Target\n{table}\n")


def test_the_claims_hold_at_quick_scale():
    run = Run(scale="quick", seeds=[11, 12, 13])
    paper.experiment(run)
    verdict = judge(claims(), run.measures, run.scale)
    assert verdict.outcome is Outcome.HOLDS, verdict.reason
    assert {f.name for f in run.figures} == {"Perturbation tests, breast cancer, MLP", "Faithfulness matrix"}
    to_captum = [m.value for m in run.measures if m.metric == "cosine distance to captum"]
    assert all(v < 1e-5 for v in to_captum)


def test_the_full_study_reads_csv_files(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "EPOCHS", (3, 3))
    for name, classify in (("who", False), ("heloc", True)):
        for part, rows, seed in (("train80", 160, 0), ("test20", 30, 1)):
            write_csv(tmp_path / name / f"{name}-clean-{part}.csv", rows, seed=seed, classify=classify)
    run = Run(scale="paper", seeds=[0], data=tmp_path)
    paper.full_study(run)
    for dataset in ("WHO", "HELOC"):
        models = {
            m.setting["model"] for m in run.measures if m.setting.get("dataset") == dataset and "model" in m.setting
        }
        assert models == {"linear" if dataset == "WHO" else "logistic", "MLP-2", "MLP-4", "MLP-7"}
    linear = {(m.method, m.metric): m.value for m in run.measures if m.setting.get("model") == "linear"}
    # With a linear model every method of a family ranks alike, so the families are what is compared.
    assert linear["lime", "bottom-k change of f, binary"] == pytest.approx(
        linear["occlusion", "bottom-k change of f, binary"]
    )
    assert {f.name for f in run.figures} == {"Perturbation tests, WHO, MLP-2", "Perturbation tests, HELOC, MLP-2"}


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(MissingData, match="who-clean-train80"):
        paper.full_study(Run(scale="paper", seeds=[0], data=tmp_path))
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    write_csv(good, 10, seed=0, classify=False)
    bad.write_text("a,b\n1,2\n3,x\n")
    with pytest.raises(ValueError, match=r"bad\.csv"):
        paper.load_split(bad, good, scale_target=True)
    bad.write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(ValueError, match="columns"):
        paper.load_split(good, bad, scale_target=True)
    with pytest.raises(ValueError, match="0 or 1"):
        paper.load_split(good, good, scale_target=False)


def test_scaling_uses_the_training_rows_alone(tmp_path):
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("a,b,y\n0,7,10\n4,7,30\n")
    test.write_text("a,b,y\n2,7,20\n8,9,50\n")
    split = paper.load_split(train, test, scale_target=True)
    np.testing.assert_allclose(split.test, [[0.5, 0], [1, 1]])  # clipped; a constant column does not divide by zero
    np.testing.assert_allclose(split.test_target, [0.5, 2])


def test_a_diverging_training_halves_the_rate(monkeypatch):
    monkeypatch.setattr(paper, "EPOCHS", (2, 2))
    rng = np.random.default_rng(0)
    X, y = 30 * rng.random((200, 3)), rng.random(200)
    split = paper.Split(*(paper.torch.from_numpy(v) for v in (X, y, X, y)))
    model, rate = paper.paper_model(split, 0, classify=False, seed=0)
    assert rate < 0.2
    assert np.isfinite(paper.squared_error(model, split))
