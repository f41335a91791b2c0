"""Landscapes, tables from files, what is reported of designs, and the searches that BIB is compared with."""

import gzip
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from locally.design.bidirectional import (
    CMAES,
    CbAS,
    Evolution,
    MotifLandscape,
    OfflineTask,
    Reinforce,
    SequenceSpace,
    TableError,
    binding_task,
    evaluate_designs,
    read_binding,
    read_table,
)

PAIR = str.maketrans("ACGT", "TGCA")


def write_binding(path, length=3, scores=None):
    """All k-mers, reverse complements folded, as UniPROBE lists them."""
    rng = np.random.default_rng(0)
    lines, known = ["8-mer\t8-mer\tE-score\tMedian\tZ-score"], {}
    for word in map("".join, itertools.product("ACGT", repeat=length)):
        other = word.translate(PAIR)[::-1]
        if other in known:
            continue
        known[word] = known[other] = float(rng.normal())
        lines.append(f"{word}\t{other}\t{known[word]:.6f}\t1.0\t0.1")
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return known


def test_binding_table_covers_both_strands_and_scales_to_one(tmp_path):
    path = tmp_path / "X_3mers.tsv.gz"
    known = write_binding(path)
    indices, y = read_binding(path)
    assert indices.shape == (64, 3)
    assert (y.min(), y.max()) == (0.0, 1.0)
    words = SequenceSpace("dna", 3).decode(indices)
    raw = np.array([known[w] for w in words])
    np.testing.assert_allclose(y, (raw - raw.min()) / np.ptp(raw), atol=1e-6)

    task = binding_task(path)
    assert len(task.sequences) == 32
    assert task.scores.max() == pytest.approx(np.sort(y)[31])
    np.testing.assert_allclose(task.oracle(indices), y)
    assert task.evaluate(words).max == 1.0
    assert len(binding_task(path, part="lowest", lowest=10).scores) == 10

    np.save(tmp_path / "x_X.npy", np.concatenate([indices, 3 - indices[:, ::-1]]).astype(np.int32))
    both = np.concatenate([y, y])[:, None].astype(np.float32)
    np.save(tmp_path / "y_X.npy", both)
    again, z = read_binding(tmp_path / "x_X.npy")
    np.testing.assert_array_equal(again, indices)
    np.testing.assert_allclose(z, y, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a\tb\tc\n", "no rows"),
        ("a\tb\tc\nACG\tCGT\n", "line 2 has 2 columns"),
        ("a\tb\tc\nACG\tCGT\tx\n", "line 2 has no number"),
        ("a\tb\tc\nACG\tCGT\tnan\n", "line 2 has a score that is not finite"),
        ("a\tb\tc\nANG\tCGT\t1\n", "line 2 has the letter 'N'"),
        ("a\tb\tc\nACG\tCGT\t1\nAC\tGT\t2\n", "different lengths"),
        ("a\tb\tc\nACG\tCGT\t1\n", "all scores are the same"),
        ("a\tb\tc\nACG\tCGT\t1\nACC\tGGT\t2\n", "has 4 of the 64 sequences"),
        ("a\n1\n", "no column 2"),
    ],
)
def test_what_is_wrong_with_a_binding_table_is_said(tmp_path, text, message):
    path = tmp_path / "t.tsv"
    path.write_text(text)
    with pytest.raises(TableError, match=message):
        binding_task(path)


def test_tables_by_heading_and_missing_files(tmp_path):
    (tmp_path / "p.csv").write_text("name,score,sequence\na,1.5,MKV\nb,-2,MKL\n")
    sequences, scores = read_table(tmp_path / "p.csv", sequence="sequence", score="score")
    assert sequences == ["MKV", "MKL"]
    np.testing.assert_array_equal(scores, [1.5, -2])
    with pytest.raises(TableError, match="no column 'fitness'"):
        read_table(tmp_path / "p.csv", score="fitness")
    with pytest.raises(TableError, match="no such file"):
        read_table(tmp_path / "q.csv")
    np.save(tmp_path / "x_a.npy", np.zeros((3, 2)))
    with pytest.raises(TableError, match=r"y_a\.npy"):
        read_binding(tmp_path / "x_a.npy")


def test_the_real_table_has_its_known_figures():
    path = Path(os.environ.get("LOCALLY_DATA", "")) / "tfbind8" / "SIX6_REF_R1_8mers.tsv.gz"
    if "LOCALLY_DATA" not in os.environ or not path.exists():
        pytest.skip("LOCALLY_DATA names no folder with tfbind8/")
    indices, y = read_binding(path)
    assert len(y) == 65_536
    space = SequenceSpace("dna", 8)
    by = dict(zip(space.decode(indices), y))
    assert by["AAAAAAAA"] == pytest.approx(0.52475, abs=1e-4)
    assert by["AAAAAAAC"] == pytest.approx(0.36651, abs=1e-4)
    assert (y > 0.9).mean() == pytest.approx(0.0144, abs=3e-4)
    assert binding_task(path).scores.max() == pytest.approx(0.4393, abs=1e-3)
    assert binding_task(path, part="lowest").scores.max() == pytest.approx(0.2419, abs=1e-3)


# Landscapes and reports


def test_motifs_score_by_their_best_match():
    land = MotifLandscape(3)
    for sequence in land.draw(5, 0.3, np.random.default_rng(0)):
        expected = 0.0
        for motif, effect in zip(land.motifs, (1, 1, 1, -1, -1, -0.5)):
            matches = max((sequence[p : p + 6] == motif).mean() for p in range(15))
            expected += effect * matches**3
        assert land.score(sequence[None])[0] == pytest.approx(expected)


def test_a_task_holds_the_poor_half_and_the_same_seed_gives_the_same():
    task, corpus = MotifLandscape(5).task(200, 500)
    again, corpus_again = MotifLandscape(5).task(200, 500)
    np.testing.assert_array_equal(task.sequences, again.sequences)
    np.testing.assert_array_equal(corpus, corpus_again)
    assert len(task.scores) == 100
    normalised = task.normalised(task.scores)
    assert normalised.min() == 0
    assert normalised.max() < 0.7
    np.testing.assert_allclose(task.oracle(task.sequences), task.scores)
    with pytest.raises(ValueError, match="length"):
        MotifLandscape(0, length=5)


def test_report_counts_what_is_different():
    space = SequenceSpace("dna", 4)
    table = space.encode(["AAAA", "CCCC"])
    found = evaluate_designs(lambda x: x.sum(1), space, ["AAAA", "AAAA", "CCCT"], table, 0.0, 2.0)
    assert (found.max, found.median, found.unique) == (3.0, 0.0, 2)
    assert found.novelty == pytest.approx(1 / 3)
    assert found.diversity == pytest.approx(4 * 4 / 6)
    with pytest.raises(ValueError, match="low"):
        evaluate_designs(lambda x: x.sum(1), space, ["AAAA"], table, 2.0, 2.0)
    task = OfflineTask("t", space, table, np.array([0.0, 4.0]), lambda x: x.sum(1), 0.0, 4.0)
    with pytest.raises(ValueError, match="designs"):
        task.evaluate(["AAAN"])


# Searches


@pytest.mark.parametrize(
    "search", [Evolution(30, 40), CMAES(40, 24), Reinforce(60, 40), CbAS(30, 60)], ids=lambda s: type(s).__name__
)
def test_searches_climb_keep_their_budget_and_repeat(search):
    asked = []

    def score(x):
        asked.append(len(x))
        return (x == np.arange(10) % 4).sum(1).astype(float)

    start = np.random.default_rng(1).integers(0, 4, (12, 10))
    found = search(score, start, 4, 5, np.random.default_rng(0))
    assert found.shape == (5, 10)
    assert sum(asked) == len(start) + search.rounds * search.population
    values = score(found)
    assert values[0] >= 8 > score(start).max()
    assert (np.diff(values) <= 0).all()
    assert len(np.unique(found, axis=0)) == 5
    np.testing.assert_array_equal(found, search(score, start, 4, 5, np.random.default_rng(0)))


def test_a_score_that_is_not_finite_ends_a_search():
    with pytest.raises(ValueError, match="NaN"):
        Evolution(2, 4)(lambda x: np.full(len(x), np.nan), np.zeros((2, 3), int), 4, 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Evolution(rounds=0), "rounds"),
        (lambda: Evolution(greed=2.0), "greed"),
        (lambda: CMAES(population=3), "population"),
        (lambda: CMAES(sigma=0.0), "sigma"),
        (lambda: Reinforce(rate=-1.0), "rate"),
        (lambda: CbAS(quantile=1.5), "quantile"),
    ],
)
def test_impossible_searches_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
