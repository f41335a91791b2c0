"""The experiment at quick scale, its networks and measures, and the full-size study on small files of its format."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import locally.papers.linear_interpreters as paper
from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, judge

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def quick() -> Run:
    run = Run(scale="quick", seeds=(3, 4))
    paper.experiment(run)
    return run


def test_quick_scale_decides_the_reconstruction(quick):
    (card,) = (p for p in load() if p.slug == "linear-interpreters")
    findings = judge(card.claims, quick.measures, quick.scale).findings
    decided = [f for f in findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert [f.outcome for f in decided] == [Outcome.HOLDS]
    recorded = {(m.method, m.metric) for m in quick.measures}
    assert all((c.method, c.metric) in recorded for c in card.claims if c.scale != "paper")
    assert len(quick.figures) == 5


def test_what_must_agree_does(quick):
    by = {}
    for m in quick.measures:
        by.setdefault(m.metric, []).append(m.value)
    assert max(by["votes that do not add up to the score"]) < 1e-5
    assert max(by.get("relative difference to the votes", [0])) < 1e-5  # captum
    shares = [v for k, values in by.items() if "share" in k or "accuracy" in k for v in values]
    assert 0 <= min(shares) <= max(shares) <= 1


def test_every_seed_is_recorded_and_seeds_repeat():
    def measures():
        run = Run(scale="quick", seeds=(7,))
        paper.upscaling(run, paper.Study(1, 1, 1, 2, 2, 8, 12), paper.load_photographs(), 7, draw=False)
        return [(m.metric, m.value) for m in run.measures]

    assert measures() == measures()


def test_the_torn_image_holds_its_own_answer():
    x, whole = paper.torn(torch.rand(2, 1, 32, 32), left=16)
    assert not x[..., 16:21].any()
    assert torch.equal(whole[..., 16:21], x[..., 8:13])
    keep = [c for c in range(32) if not 16 <= c < 21]
    assert torch.equal(whole[..., keep], x[..., keep])


def write_study(folder, width, blocks, count=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = paper.EDSR(width, blocks)
    state = net.state_dict() | {f"{m}.weight": torch.eye(3)[..., None, None].clone() for m in ("sub_mean", "add_mean")}
    (folder / "edsr").mkdir()
    (folder / "urban100").mkdir()
    save_file(state, folder / "edsr/edsr_baseline_x4.safetensors")
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"urban100/img_{i:03}.png")


def test_the_full_study_reads_weights_and_images(tmp_path):
    write_study(tmp_path, 4, 1)
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.full_study(run, crop=8, count=16, width=4, blocks=1)
    metric = "median support of singular images / that of bicubic upscaling, EDSR"
    assert {m.setting["image"] for m in run.measures if m.metric == metric} == {"img_000", "img_001"}
    assert all(m.value < 1e-5 for m in run.measures if m.metric == paper.ERROR)
    assert [f.name for f in run.figures] == ["Singular images"]


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(MissingData, match="edsr_baseline_x4"):
        paper.experiment(Run(scale="paper", seeds=(0,), data=tmp_path))
    write_study(tmp_path, 4, 1, count=0)
    with pytest.raises(ValueError, match="does not hold the weights of EDSR"):
        paper.full_study(Run(scale="paper", seeds=(0,), data=tmp_path))
    with pytest.raises(MissingData, match="no PNG"):
        paper.full_study(Run(scale="paper", seeds=(0,), data=tmp_path), width=4, blocks=1)
    Image.fromarray(np.zeros((40, 300, 3), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="at least 192"):
        paper.centre(tmp_path / "small.png", 192)
