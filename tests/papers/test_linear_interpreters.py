"""The experiment at quick scale, its networks and measures, and the full-size study on small files of its format."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import locally.papers.linear_interpreters as paper
from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, judge
from locally.tangent.interpreter.published import EDSR, VGG, CycleGenerator, ResNet, load_weights

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
        net = EDSR(width, blocks)
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
    paper.super_resolution(run, crop=8, count=16, width=4, blocks=1)
    metric = "median support of singular images / that of bicubic upscaling, EDSR"
    assert {m.setting["image"] for m in run.measures if m.metric == metric} == {"img_000", "img_001"}
    assert all(m.value < 1e-5 for m in run.measures if m.metric == paper.ERROR)
    assert [f.name for f in run.figures] == ["Singular images, EDSR"]


def save_photograph(path, height, width, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path)


def save_network(path, net):
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)


def small_classifiers():
    torch.manual_seed(0)
    return {
        "vgg19": lambda: VGG((1, 1, 2), width=4, hidden=16, classes=3),
        "resnet152": lambda: ResNet((1, 2), width=4, classes=3),
    }


def test_the_full_study_reads_class_folders(tmp_path):
    for k, (name, suffix) in enumerate((("n01", "JPEG"), ("n02", "jpg"), ("n03", "png"))):
        save_photograph(tmp_path / f"imagenet/val/{name}/image_{k}.{suffix}", 40 + 8 * k, 64, k)
    for name, make in small_classifiers().items():
        save_network(tmp_path / f"imagenet/{name}.safetensors", make())
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.image_classifiers(run, size=32, short=36, networks=small_classifiers())
    by = {}
    for m in run.measures:
        by.setdefault((m.method, m.metric), []).append(m)
    for method in ("network", "residual alone", "F x alone"):
        found = by[method, "accuracy, ImageNet"]
        assert {m.setting["image"] for m in found} == {"image_0", "image_1", "image_2"}
        assert {m.setting["network"] for m in found} == {"vgg19", "resnet152"}
        assert {m.value for m in found} <= {0.0, 1.0}
    assert max(m.value for m in by[paper.OURS, paper.ERROR]) < 1e-5
    assert [f.name for f in run.figures] == ["Votes on an image, vgg19", "Votes on an image, resnet152"]

    save_photograph(tmp_path / "imagenet/val/n04/more.png", 40, 40)
    with pytest.raises(ValueError, match=r"vgg19 has 3 classes, .* 4 folders"):
        paper.image_classifiers(run, size=32, short=36, networks=small_classifiers())


def test_the_full_study_reads_two_sides_of_images(tmp_path):
    torch.manual_seed(0)
    for side, other in ("AB", "BA"):
        for k in range(2):
            save_photograph(tmp_path / f"cyclegan/test{side}/{side}{k}.jpg", 40, 48, k)
        save_network(tmp_path / f"cyclegan/{side}2{other}.safetensors", CycleGenerator(4, 1))
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.horses_and_zebras(run, size=32, width=4, blocks=1, rows=3)
    values = {}
    for m in run.measures:
        values.setdefault(m.metric, {})[m.setting.get("image", m.setting["network"])] = m.value
    shares, distances = values["template share, CycleGAN"], values["distance that rows look at, CycleGAN"]
    assert set(shares) == set(distances) == {"A0", "A1", "B0", "B1"}
    assert all(0 < v < 1 for v in shares.values())
    assert all(0 < v < 45 for v in distances.values())
    (tmp_path / "cyclegan/testB/B0.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"B0\.jpg is no image"):
        paper.horses_and_zebras(run, size=32, width=4, blocks=1, rows=3)


@pytest.mark.parametrize(
    ("net", "names", "parameters"),
    [
        (VGG, ("features.34.weight", "classifier.6.bias"), 143_667_240),
        (ResNet, ("layer3.35.conv3.weight", "layer4.0.downsample.1.running_var", "fc.bias"), 60_192_808),
        (CycleGenerator, ("model.10.conv_block.5.weight", "model.19.bias", "model.26.weight"), 11_378_179),
    ],
)
def test_published_weights_fit_by_name_and_number(net, names, parameters):
    with torch.device("meta"):
        built = net()
    assert set(names) <= set(built.state_dict())
    assert sum(p.numel() for p in built.parameters()) == parameters


def test_a_full_study_without_files_says_what_it_reads(tmp_path):
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(MissingData, match="ImageNet's validation images"):
        paper.experiment(Run(scale="paper", seeds=(0,), data=tmp_path))
    (tmp_path / "imagenet/val").mkdir()
    with pytest.raises(ValueError, match="no folders, one for each class"):
        paper.experiment(Run(scale="paper", seeds=(0,), data=tmp_path))
    (tmp_path / "imagenet").rename(tmp_path / "cyclegan")
    with pytest.raises(MissingData, match="generator from A to B"):
        paper.experiment(Run(scale="paper", seeds=(0,), data=tmp_path))


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(MissingData, match="edsr_baseline_x4"):
        paper.experiment(Run(scale="paper", seeds=(0,), data=tmp_path))
    write_study(tmp_path, 4, 1, count=0)
    with pytest.raises(ValueError, match="does not hold the weights of EDSR"):
        paper.full_study(Run(scale="paper", seeds=(0,), data=tmp_path))
    with pytest.raises(MissingData, match="no JPEG or PNG"):
        paper.super_resolution(Run(scale="paper", seeds=(0,), data=tmp_path), width=4, blocks=1)
    (tmp_path / "noise.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_weights(EDSR(4, 1), tmp_path / "noise.safetensors")
    Image.fromarray(np.zeros((40, 300, 3), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="at least 192"):
        paper.read_image(tmp_path / "small.png", 192)
