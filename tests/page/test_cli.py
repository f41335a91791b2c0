"""The command line as people and scripts meet it: what it prints, how it ends, what it says of bad input."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from locally import catalogue
from locally.page.preprints import Preprint, Preprints
from locally.page.store import Store
from tests.page.conftest import CARD, GOOD

FAILING = "def experiment(run):\n    for s in run.seeds: run.record('ours', 'error', 5.0, seed=s)\n"
CRASHING = "def experiment(run):\n    raise RuntimeError('the engine broke')\n"


def locally(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locally.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def refused(*words: str, **environment: str) -> str:
    """Standard error of a command that must end as bad usage: one line, status 2, no traceback."""
    ended = locally(*words, **environment)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith("locally: ")
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_run_stores_reports_and_ends_by_the_verdict(add_paper, home, tmp_path):
    add_paper("good")
    add_paper("failing", FAILING)
    ended = locally("run", "good", "failing", "--scale", "quick", "-j", "2", "-o", str(tmp_path / "out"))
    assert ended.returncode == 1
    assert ended.stdout == f"Report: {tmp_path / 'out' / 'index.html'}\n"
    assert "good: holds" in ended.stderr
    assert "failing: fails" in ended.stderr
    assert "\x1b" not in ended.stderr + ended.stdout
    listed = {p["slug"]: p for p in json.loads(locally("list", "--json").stdout)}
    assert (listed["good"]["verdict"], listed["failing"]["verdict"]) == ("holds", "fails")
    assert listed["good"]["scale"] == "quick"


def test_json_is_one_object_a_paper(add_paper):
    add_paper("good")
    add_paper("failing", FAILING)
    ended = locally("run", "good", "--scale", "quick", "--json")
    assert ended.returncode == 0
    assert ended.stderr == ""
    shown = json.loads(ended.stdout)
    agreed = {"slug", "scale", "verdict", "reason", "claim", "measures", "seconds", "peak_memory_mib", "versions"}
    assert agreed <= shown.keys()
    assert (shown["slug"], shown["verdict"], shown["scale"]) == ("good", "holds", "quick")
    assert shown["measures"][0].keys() == {"method", "metric", "value", "seed", "setting"}
    both = locally("run", "good", "failing", "--scale", "quick", "--json")
    assert {json.loads(line)["slug"] for line in both.stdout.splitlines()} == {"good", "failing"}
    assert both.returncode == 1


def test_a_crash_ends_with_3_and_keeps_the_rest(add_paper):
    add_paper("good")
    add_paper("crashing", CRASHING)
    ended = locally("run", "crashing", "good", "--scale", "quick", "--json")
    assert ended.returncode == 3
    assert "RuntimeError: the engine broke" in ended.stderr
    listed = {p["slug"]: p["verdict"] for p in json.loads(locally("list", "--json").stdout)}
    assert (listed["good"], listed["crashing"]) == ("holds", "crashed")


def test_resume_skips_what_is_stored(add_paper):
    add_paper("good")
    assert locally("run", "good", "--scale", "quick").returncode == 0
    again = locally("run", "good", "--scale", "quick", "--resume")
    assert again.returncode == 0
    assert "1 of 1 stored already" in again.stderr
    assert "good: holds" not in again.stderr
    more = locally("run", "good", "--scale", "quick", "--resume", "--seeds", "4")
    assert "good: holds" in more.stderr


def test_ctrl_c_stops_cleanly_and_keeps_what_ended(add_paper, home):
    add_paper("good")
    add_paper("slow", "import time\ndef experiment(run): time.sleep(600)")
    command = [sys.executable, "-m", "locally.cli", "run", "good", "slow", "--scale", "quick"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    database = home / "runs.sqlite"
    for _ in range(600):
        if database.exists() and _stored(database) == 1:
            break
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "1 finished of 2 kept" in errors
    assert _stored(database) == 1


def _stored(database) -> int:
    connection = sqlite3.connect(database)
    try:
        return connection.execute("select count(*) from runs").fetchone()[0]
    except sqlite3.Error:
        return 0
    finally:
        connection.close()


def test_show_tells_card_claims_evidence_and_use(add_paper):
    add_paper("good")
    before = locally("show", "good").stdout
    assert "not run yet" in before
    locally("run", "good", "--scale", "quick")
    shown = locally("show", "901").stdout
    for part in ("Sketch of good", "Ada Lovelace", "error, ours <= 1", "holds", "print(1 + 1)", "--seeds 3"):
        assert part in shown
    assert "<b>that weaves</b>" in shown


def test_list_fits_a_pipe_and_search_finds(add_paper):
    add_paper("good", title="A rather particular thing")
    add_paper("unwritten", None)
    listed = locally("list").stdout
    assert "\x1b" not in listed
    assert "not yet runnable" in listed
    assert "A rather particular thing" in locally("search", "particular", "lovelace").stdout


def test_report_is_written_without_runs(tmp_path):
    ended = locally("report", "-o", str(tmp_path / "out"))
    assert ended.returncode == 0
    assert (tmp_path / "out" / "index.html").exists()


def test_help_tells_what_arguments_are():
    assert "arXiv ids" in locally("run", "--help").stdout


def test_search_finds_fetched_papers_too_and_stays_light_without_them(add_paper):
    add_paper("good", title="A rather particular thing")
    probe = "import sys, locally.cli as c\nsys.argv = ['locally', 'search', 'particular']\n"
    probe += "try: c.main()\nexcept SystemExit: pass\nprint([m for m in ('numpy', 'sqlalchemy') if m in sys.modules])"
    locally("list")  # makes the database
    light = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert light.stdout.splitlines()[-1] == "[]"
    assert "to read" not in light.stdout
    when = "2026-01-02T00:00:00+00:00"
    weaving = Preprint("2601.00001", "Weaving particular looms", ("Ada",), "Words.", when, when, when[:10])
    Preprints(Store()).add([weaving, replace(weaving, key="2601.00002", title="Barrel organs")])
    found = locally("search", "particular").stdout
    assert found.index("A rather particular thing") < found.index("to read:") < found.index("Weaving particular looms")
    assert "2601.00001  2026-01-02" in found
    assert "Barrel organs" in locally("search", "organs").stdout
    refused("search", "zzyzx")


def test_list_and_help_stay_light():
    """Three times the processor time of importing typer and rich at most, which numpy alone would exceed."""
    locally("list")
    for words in (["list"], ["--help"]):
        ours, least = [], []
        for _ in range(7):
            least.append(_seconds([sys.executable, "-c", "import typer, rich"]))
            ours.append(_seconds([sys.executable, "-m", "locally.cli", *words]))
        assert min(ours) <= 3 * min(least), (words, min(ours), min(least))
    probe = "import sys, locally.cli as c\nsys.argv = ['locally', 'list']\ntry: c.main()\nexcept SystemExit: pass\n"
    probe += "print([m for m in ('torch', 'numpy', 'scipy', 'matplotlib', 'sqlalchemy') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert loaded.stdout.splitlines()[-1] == "[]"


def _seconds(command: list[str]) -> float:
    """Processor time, which other work on the machine does not lengthen as it does the clock's."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "lerning-to-relax"), "nearest: learning-to-relax"),
        (("show", "lerning-to-relax"), "nearest: learning-to-relax"),
        (("run", "good", "--scale", "huge"), "--scale must be one of quick, default, paper, got 'huge'"),
        (("run", "good", "--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("run", "good", "--seeds", "many"), "'many' is not a valid int"),
        (("run", "good", "-j", "0"), "--jobs must be at least 1"),
        (("run", "good", "--time-limit", "-1"), "--time-limit must be non-negative"),
        (("run", "good", "--memory-limit", "nan"), "--memory-limit must be non-negative"),
        (("run", "good", "--device", "abacus"), "--device abacus cannot be used"),
        (("run", "good", "--data", "/nowhere/at/all"), "/nowhere/at/all, which is not a folder"),
        (("run", "good", "-o", __file__), "it is a file"),
        (("run",), "name at least one paper, or give --all"),
        (("run", "good", "--all"), "not both"),
        (("run", "unwritten"), "unwritten is not yet runnable"),
        (("run", "--bogus"), "No such option"),
        (("dance",), "No such command 'dance'"),
        (("show",), "Missing argument 'SLUG'"),
        (("search", "zzyzx"), "nothing found for 'zzyzx'"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(add_paper, words, says):
    add_paper("good")
    add_paper("unwritten", None)
    assert says in refused(*words)


def test_a_study_without_its_data_is_one_line_and_status_2(add_paper):
    add_paper("study", "def experiment(run): run.data('who/life.csv', 'WHO life expectancy')")
    ended = locally("run", "study", "--scale", "paper", "--json")
    assert ended.returncode == 2
    assert "who/life.csv (WHO life expectancy): name the folder that holds it with --data DIR" in ended.stderr
    assert json.loads(locally("list", "--json").stdout)[-1]["verdict"] is None  # nothing stored


def test_a_broken_card_is_one_line_and_status_2(add_paper):
    file = add_paper("broken", card=CARD.format(number=901, slug="broken", title="x").replace("venue", "revenue"))
    assert f"{file}: venue: is missing" in refused("list")


def test_an_unwritable_home_is_one_line_and_status_2(add_paper, tmp_path):
    add_paper("good")
    (tmp_path / "file").write_text("")
    for words in (["list"], ["run", "good"], ["report"], ["show", "good"]):
        assert "cannot write the data folder" in refused(*words, LOCALLY_HOME=str(tmp_path / "file" / "home"))


def test_a_damaged_and_a_newer_database_are_one_line_and_status_2(add_paper, home):
    add_paper("good", GOOD)
    locally("run", "good", "--scale", "quick")
    connection = sqlite3.connect(home / "runs.sqlite")
    connection.execute("update alembic_version set version_num = '9999'")
    connection.commit()
    connection.close()
    for words in (["list"], ["run", "good"], ["show", "good"], ["report"]):
        assert "written by a newer version" in refused(*words)
    for part in home.glob("runs.sqlite-*"):
        part.unlink()
    (home / "runs.sqlite").write_bytes(b"no database at all" * 99)
    assert "set aside as" in refused("list")
    assert len(list(home.glob("runs-damaged-*.sqlite"))) == 1
    assert locally("list").returncode == 0


def test_a_missing_extra_says_which_to_install(add_paper):
    code = "from locally.errors import require\ndef experiment(run): require('not_a_package', 'control')\n"
    add_paper("extra", code)
    ended = locally("run", "extra", "--scale", "quick", "--json")
    assert ended.returncode == 2
    assert 'pip install "locally[control]"' in ended.stderr


def test_every_paper_is_listed():
    listed = json.loads(locally("list", "--json").stdout)
    assert [p["slug"] for p in listed] == [p.slug for p in catalogue.load([catalogue.BUILT_IN])]
