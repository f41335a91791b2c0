"""What is said of a full-size study before it starts, beside what it then takes."""

import json
from dataclasses import replace

import psutil
import pytest

from locally import catalogue
from locally.evidence import Scale
from locally.page.data_files import missing
from locally.page.outlook import look_ahead, product_rate
from locally.page.runner import study_folder, working_folder
from locally.page.store import Store
from locally.page.worker import Job
from tests.page.conftest import CARD
from tests.page.test_cli import locally, refused

# takes half a second, one or two for a seed, and holds 76, 153 or 458 MiB beside what Python takes
KNOWN = """
import time, numpy
def experiment(run):
    hoard = numpy.ones(run.pick(quick=1, default=2, paper=6) * 10_000_000)
    for seed in run.track(run.seeds, "seeds"):
        time.sleep(run.pick(quick=0.5, default=1.0, paper=2.0))
        run.record("ours", "error", 0.5, seed=seed)
"""
WORK = "[work]\ntime = [0.5, 1, 2]\nmemory = [0.7, 1, 2.2]\n"


@pytest.fixture
def known(add_paper):
    """A paper whose cost is known; returns how to look ahead at it."""

    def add(code: str = KNOWN, work: str = WORK, slug: str = "known"):
        add_paper(slug, code, card=CARD.format(number=901, slug=slug, title="Known") + work)

        def look(**job):
            paper = catalogue.find(catalogue.load(), slug)
            asked = Job(**{"slug": slug, "scale": Scale.PAPER, "seeds": (0, 1, 2)} | job)
            return look_ahead(paper, asked, Store().history(slug))

        return look

    return add


def ahead(*words: str) -> dict:
    ended = locally("run", "known", "--scale", "paper", "--seeds", "3", "--estimate", "--json", *words)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_an_estimate_is_near_what_the_study_takes(known):
    known()
    first = ahead()
    assert first["basis"] == "from 1 run at quick scale and the sizes on its card"
    assert [e.scale for e in Store().history("known")] == [Scale.QUICK]  # measured, and nothing else was run
    ended = locally("run", "known", "--scale", "paper", "--seeds", "3", "--json")
    assert ended.returncode == 0, ended.stderr
    lines = [line.strip() for line in ended.stderr.splitlines()]
    assert lines[0] == "known, paper scale, 3 seeds on cpu"
    assert lines[1].startswith("time: about ")
    assert lines[2].startswith("memory: about 0.")
    taken = json.loads(ended.stdout)
    for name, key in (("seconds", "seconds"), ("memory_mib", "peak_memory_mib")):
        assert first[name]["low"] <= taken[key] <= first[name]["high"]
        assert taken[key] / 3 <= first[name]["likely"] <= 3 * taken[key]
    again = ahead()
    assert again["basis"] == "from 1 run at paper scale"
    assert again["seconds"]["likely"] == pytest.approx(taken["seconds"], rel=1e-3)
    assert again["memory_mib"]["likely"] == pytest.approx(taken["peak_memory_mib"], rel=1e-2)


def test_what_cannot_fit_does_not_start_unless_it_is_told_to(known):
    known()
    look = ahead("--memory-limit", "30")
    assert look["memory_limit_mib"] == 30
    said = locally("run", "known", "--scale", "paper", "--seeds", "1", "--estimate", "--memory-limit", "30").stdout
    assert "it will not fit into memory: it starts with --anyway alone" in said
    words = ("run", "known", "--scale", "paper", "--seeds", "1", "--memory-limit", "30")
    ended = locally(*words)
    assert ended.returncode == 2
    assert "GiB is the limit here: give --anyway to start it all the same" in ended.stderr.splitlines()[-1]
    assert {e.scale for e in Store().history("known")} == {Scale.QUICK}
    started = locally(*words, "--anyway")
    assert started.returncode == 3
    assert "stopped at its memory limit of 30 MiB" in started.stderr


def test_a_gpu_and_a_cluster_have_memory_of_their_own(known):
    look = known()
    locally("run", "known", "--scale", "quick", "--json")
    here = look(memory_limit=30.0)
    assert here.too_large
    assert not replace(here, here=False).too_large
    assert not look(memory_limit=30.0, device="cuda:0").too_large
    assert "the limit" not in "\n".join(replace(here, here=False).lines())


def test_nothing_known_is_said(known):
    look = known(work="")
    assert "says nothing of its size" in look().lines()[1]
    both = locally("run", "known", "--scale", "paper", "--estimate")
    assert both.returncode == 0
    assert "time and memory: unknown" in both.stdout
    assert Store().history("known") == []  # the quick study would tell nothing
    shown = json.loads(locally("run", "known", "--scale", "paper", "--estimate", "--json").stdout)
    assert shown["seconds"] is None
    assert "says nothing of its size" in shown["unknown"]


def test_a_study_whose_quick_one_crashes_is_unknown_and_may_start(known):
    code = "def experiment(run):\n    run.record('ours', 'error', 0.5 / run.pick(quick=0, default=0, paper=1), seed=0)"
    known(code)
    ended = locally("run", "known", "--scale", "paper", "--seeds", "1")
    assert "unknown: the study has never finished" in ended.stderr
    assert "known: inconclusive" in ended.stderr  # a single seed


READING = """
WHERE = "tables"
def experiment(run):
    for part in ("train", "test"):
        run.data(f"{WHERE}/{part}.csv", f"rows to {part}")
    path = run.data(part, "anything")
    run.data("mnist", "images")
"""


def test_data_that_are_not_there_are_named(known, tmp_path):
    look = known(READING)
    (tmp_path / "data" / "tables").mkdir(parents=True)
    said = "\n".join(look().lines())
    assert "name their folder with --data: tables/<part>.csv (rows to <part>); mnist (images)" in said
    (tmp_path / "data" / "mnist").mkdir()
    data = str(tmp_path / "data")
    assert f"not in {data}: tables/<part>.csv" in "\n".join(look(data=data).lines())
    (tmp_path / "data" / "tables" / "test.csv").touch()
    assert look(data=data).missing == ()
    assert "data" not in "\n".join(look(data=data).lines()[1:])
    assert look(scale=Scale.QUICK).missing == ()


def test_every_experiment_can_be_read_for_its_data(tmp_path):
    found = {p.slug: missing(p.experiment, tmp_path) for p in catalogue.load([catalogue.BUILT_IN])}
    assert ("Llama-3.1-70B", "the checkpoint's folder, with its tokenizer") in found["tyr-the-pruner"]
    assert found["halpern"] == []
    assert sum(map(bool, found.values())) > 20


def test_what_an_earlier_attempt_has_left_is_said(known):
    look = known()
    job = Job("known", Scale.PAPER, (0, 1, 2))
    assert not look().attempted
    with working_folder(job) as folder:
        (folder / "items").mkdir()
        for i in range(2):
            (folder / "items" / f"0-{i}.item").touch()
    assert folder == study_folder(job)
    assert "goes on where an earlier attempt was stopped, with 2 finished items" in look().lines()[-1]
    assert look().to_dict()["items_kept"] == 2
    assert not look(seeds=(0, 1)).attempted


def test_disk_and_the_time_limit_are_said(known):
    look = known(work=WORK + "disk = 600\n")
    locally("run", "known", "--scale", "quick", "--json")
    said = "\n".join(look(time_limit=1.0).lines())
    assert "it is stopped after 1 s: --time-limit says otherwise" in said
    assert "disk: about 600 GiB until it is finished" in said
    assert "it is stopped after" not in "\n".join(look().lines())


def test_several_are_added_up(known, add_paper):
    known()
    add_paper("unknown", KNOWN, card=CARD.format(number=902, slug="unknown", title="Unknown"))
    ended = locally("run", "known", "unknown", "--scale", "default", "--estimate")
    assert ended.returncode == 0
    assert "known, default scale, 5 seeds on cpu" in ended.stdout
    last = ended.stdout.splitlines()[-1]
    assert last.startswith("2 studies one after another: about ")
    assert last.endswith("without 1 of which nothing is known")


def test_a_cluster_tells_it_too(known):
    pytest.importorskip("distributed", reason="needs the extra cluster")
    known()
    ended = locally("run", "known", "--scale", "paper", "--seeds", "2", "--cluster", "local:1", "--json")
    assert ended.returncode == 0, ended.stderr
    assert "known, paper scale, 2 seeds on cpu" in ended.stderr
    assert "GiB are free" not in ended.stderr
    assert json.loads(ended.stdout)["scale"] == "paper"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--estimate"), "name at least one paper"),
        (("run", "known", "--estimate", "--scale", "huge"), "--scale must be one of"),
        (("run", "known", "--estimate", "--seeds", "0"), "--seeds must be at least 1"),
        (("run", "known", "--estimate=soon"), "does not take a value"),
        (("run", "unwritten", "--estimate"), "is not yet runnable"),
        (("run", "known", "--anyway", "--estimate", "--data", "/nowhere/at/all"), "which is not a folder"),
    ],
)
def test_wrong_words_are_one_line(known, add_paper, words, says):
    known()
    add_paper("unwritten", None, card=CARD.format(number=902, slug="unwritten", title="Unwritten"))
    assert says in refused(*words)


def test_the_speed_of_products_is_a_speed():
    assert 1e8 < product_rate("cpu") < 1e12 * psutil.cpu_count()
