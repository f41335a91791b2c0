"""The experiment on small sizes, the full-size study on tiny files, and an oracle that nobody asks too early."""

import dataclasses
import gzip
import itertools
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from locally.design.bidirectional import MaskedLM, MotifLandscape
from locally.evidence import MissingData, Run
from locally.papers import bib as paper
from tests.design.test_bidirectional_tasks import PAIR

SMALL = paper.Study(
    landscapes=1,
    table=100,
    corpus=500,
    pretraining=5,
    batch=16,
    hidden=8,
    rate=1e-3,
    designs=8,
    steps=4,
    everything=True,
    measured=False,
)


@pytest.fixture(scope="module")
def card():
    return tomllib.loads(Path(paper.__file__).with_suffix(".toml").read_text())


def test_every_claim_finds_its_figure(card, without_shape_checks):
    run = Run(scale="quick", seeds=(0, 1))
    paper.carry_out(run, SMALL)
    recorded = {(m.method, m.metric) for m in run.measures}
    for claim in card["claims"]:
        if claim["scale"] == "default":
            assert (claim["method"], claim["metric"]) in recorded, claim["statement"]
    assert [figure.name for figure in run.figures] == ["motif-landscapes"]
    for metric in ("best score", "median score", "unique designs", "diversity", "novelty"):
        methods = {m.method for m in run.measures if m.metric == metric}
        assert {paper.OURS, paper.BDI, paper.TABLE, "evolution on the proxy", "CMA-ES on the proxy"} <= methods
    table = [m.value for m in run.measures if m.method == paper.TABLE and m.metric == "novelty"]
    assert table == [0, 0]


def test_no_design_is_made_after_the_oracle_was_asked(without_shape_checks):
    """Every designer and search is handed a task whose oracle raises until all designs exist."""
    task, _ = MotifLandscape(0).task(100, 200)
    made, asked = [], []

    def oracle(sequences):
        asked.append(len(made))
        return task.oracle(sequences)

    sealed = dataclasses.replace(task, oracle=oracle)
    model = MaskedLM(4, width=8, hidden=8, generator=torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    options = {"n_designs": 6, "steps": 3, "random_state": 0}
    designers = paper.gradient_designers(sealed, model, model, True, options, 3)
    designers |= paper.searches(sealed, model, 6, 3, 0)

    def watched(make):
        def call():
            found = make()
            made.append(found)
            return found

        return call

    run = Run(scale="quick", seeds=(0,))
    paper.record_all(run, sealed, {name: watched(make) for name, make in designers.items()}, 0, {})
    assert asked == [len(designers)] * len(designers)  # once for each set of designs, when all were made


def test_full_size_study_runs_on_tiny_tables_and_folders(tmp_path, golden, without_shape_checks):
    rng = np.random.default_rng(0)
    lines = ["8-mer\t8-mer\tE-score\tMedian\tZ-score"]
    for word in map("".join, itertools.product("ACGT", repeat=4)):
        other = word.translate(PAIR)[::-1]
        if word <= other:
            lines.append(f"{word}\t{other}\t{rng.normal():.4f}\t1\t1")
    (tmp_path / "tfbind8").mkdir()
    (tmp_path / "tfbind8" / "SIX6_REF_R1_8mers.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "tfbind10").mkdir()
    np.save(tmp_path / "tfbind10" / "x_pho4.npy", np.array(list(itertools.product(range(4), repeat=4))))
    np.save(tmp_path / "tfbind10" / "y_pho4.npy", rng.normal(size=(256, 1)))
    (tmp_path / "proteins").mkdir()
    for name in paper.PROTEINS:
        rows = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 6)) for _ in range(60)]
        text = "\n".join(f"{row},{rng.normal():.4f}" for row in rows)
        (tmp_path / "proteins" / f"{name}.csv").write_text("sequence,score\n" + text)
    for name in ("protbert", "prott5"):  # any folder that can be read
        shutil.copytree(golden / "29-bib" / "esm2", tmp_path / "models" / name)

    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.on_tables(run, paper.Measured(designs=6, steps=3, pretraining=3, bdi_steps=3))
    assert {m.setting["task"] for m in run.measures if "task" in m.setting} == {
        "SIX6_REF_R1_8mers", "x_pho4", *paper.PROTEINS,
    }  # fmt: skip
    (rank,) = [m.value for m in run.measures if m.metric == paper.RANK]
    assert -14 < rank < 14
    assert sum(m.metric == paper.GAIN for m in run.measures) == 5

    shutil.rmtree(tmp_path / "proteins")
    fewer = Run(scale="paper", seeds=(0,), data=tmp_path)
    shutil.copytree(golden / "29-bib" / "dnabert", tmp_path / "models" / "dnabert")
    paper.on_tables(fewer, paper.Measured(designs=4, steps=2, pretraining=2, bdi_steps=2))
    assert not any(m.metric == paper.RANK for m in fewer.measures)


def test_a_missing_table_is_asked_for(tmp_path):
    with pytest.raises(MissingData, match="tfbind8"):
        paper.measured_tasks(Run(scale="paper", seeds=(0,), data=tmp_path))


def test_scales_grow(monkeypatch):
    handed = []
    monkeypatch.setattr(paper, "carry_out", lambda run, study: handed.append(study))
    for scale in ("quick", "default", "paper"):
        paper.experiment(Run(scale=scale, seeds=(0,)))
    quick, default, full = handed
    assert quick.pretraining < default.pretraining < full.pretraining
    assert full.measured
    assert not default.measured
