"""The experiment at quick scale, its networks and measures, and the full-size study on small files of its format."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import locally.papers.linear_interpreters as paper
from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, judge
from locally.tangent.interpreter import LinearInterpreter
from locally.tangent.interpreter.published import (
    DENSENET121,
    DENSENET169,
    DENSENET201,
    EDSR,
    RCAN,
    VGG,
    AlexNet,
    CycleGenerator,
    DenseNet,
    ResNet,
    Standardised,
    load_weights,
)

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


SMALL_UPSCALERS = {"EDSR": lambda: EDSR(4, 1), "RCAN": lambda: RCAN(4, 2, 1, reduction=2)}
UPSCALER_FILES = {"EDSR": "edsr/edsr_baseline_x4.safetensors", "RCAN": "rcan/RCAN_BIX4.safetensors"}


def write_study(folder, count=2, upscalers=("EDSR",)):
    means = {f"{m}.weight": torch.eye(3)[..., None, None].clone() for m in ("sub_mean", "add_mean")}
    (folder / "urban100").mkdir()
    for name in upscalers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = SMALL_UPSCALERS[name]().state_dict() | means
        (folder / UPSCALER_FILES[name]).parent.mkdir()
        save_file(state, folder / UPSCALER_FILES[name])
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"urban100/img_{i:03}.png")


@pytest.mark.parametrize(("names", "count"), [(("RCAN",), 2), (("EDSR", "RCAN"), 1)])
def test_the_full_study_reads_weights_and_images(tmp_path, names, count):
    write_study(tmp_path, count, names)
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.super_resolution(run, crop=8, count=12, networks=SMALL_UPSCALERS)
    for name in names:
        metric = f"median support of singular images / that of bicubic upscaling, {name}"
        assert {m.setting["image"] for m in run.measures if m.metric == metric} == {f"img_00{i}" for i in range(count)}
    errors = [m for m in run.measures if m.metric == paper.ERROR]
    assert {m.setting["network"] for m in errors} == set(names)
    assert all(m.value < 1e-5 for m in errors)
    assert [f.name for f in run.figures] == [f"Singular images, {name}" for name in names]


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
        "alexnet": lambda: AlexNet((4, 6, 6, 4, 4), hidden=16, classes=3),
        "vgg19": lambda: VGG((1, 1, 2), width=4, hidden=16, classes=3),
        "resnet152": lambda: ResNet((1, 2), width=4, classes=3),
        "densenet121": lambda: DenseNet((2, 1, 2), growth=3, width=4, classes=3),
    }


def test_the_full_study_reads_class_folders(tmp_path):
    for k, (name, suffix) in enumerate((("n01", "JPEG"), ("n02", "jpg"), ("n03", "png"))):
        save_photograph(tmp_path / f"imagenet/val/{name}/image_{k}.{suffix}", 72 + 8 * k, 96, k)
    for name, make in small_classifiers().items():
        save_network(tmp_path / f"imagenet/{name}.safetensors", make())
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.image_classifiers(run, size=64, short=72, networks=small_classifiers())
    by = {}
    for m in run.measures:
        by.setdefault((m.method, m.metric), []).append(m)
    for method in ("network", "residual alone", "F x alone"):
        found = by[method, "accuracy, ImageNet"]
        assert {m.setting["image"] for m in found} == {"image_0", "image_1", "image_2"}
        assert {m.setting["network"] for m in found} == set(small_classifiers())
        assert {m.value for m in found} <= {0.0, 1.0}
    assert max(m.value for m in by[paper.OURS, paper.ERROR]) < 1e-5
    assert [f.name for f in run.figures] == [f"Votes on an image, {name}" for name in small_classifiers()]

    save_photograph(tmp_path / "imagenet/val/n04/more.png", 40, 40)
    with pytest.raises(ValueError, match=r"alexnet has 3 classes, .* 4 folders"):
        paper.image_classifiers(run, size=64, short=72, networks=small_classifiers())


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


# Parameters as published: torchvision's tables, and the authors' repositories for super-resolution and CycleGAN, there
# with 12 frozen numbers each for taking the mean colour away and adding it, which are no parameters here.
PUBLISHED = {
    "AlexNet": (AlexNet, ("features.10.weight", "classifier.1.weight", "classifier.6.bias"), 61_100_840),
    "VGG19": (VGG, ("features.34.weight", "classifier.6.bias"), 143_667_240),
    "ResNet152": (
        ResNet, ("layer3.35.conv3.weight", "layer4.0.downsample.1.running_var", "fc.bias"), 60_192_808
    ),
    "DenseNet121": (
        lambda: DenseNet(DENSENET121),
        ("features.denseblock3.denselayer24.conv2.weight", "features.transition3.norm.bias", "features.norm5.weight"),
        7_978_856,
    ),
    "DenseNet161": (
        lambda: DenseNet((6, 12, 36, 24), growth=48, width=96),
        ("features.denseblock3.denselayer36.norm1.running_mean", "classifier.bias"),
        28_681_000,
    ),
    "DenseNet169": (lambda: DenseNet(DENSENET169), ("features.conv0.weight",), 14_149_480),
    "DenseNet201": (lambda: DenseNet(DENSENET201), ("features.denseblock3.denselayer48.conv1.weight",), 20_013_928),
    "EDSR": (EDSR, ("head.0.weight", "body.15.body.2.bias", "body.16.weight", "tail.0.2.bias", "tail.1.bias"),
        1_517_571),
    "RCAN": (
        RCAN,
        ("body.9.body.19.body.3.conv_du.2.bias", "body.0.body.20.weight", "body.10.bias", "tail.0.2.weight"),
        15_592_379 - 24,
    ),
    "CycleGAN": (
        CycleGenerator, ("model.10.conv_block.5.weight", "model.19.bias", "model.26.weight"), 11_378_179
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_fit_by_name_and_number(name):
    net, names, parameters = PUBLISHED[name]
    with torch.device("meta"):
        built = net()
    assert set(names) <= set(built.state_dict())
    assert sum(p.numel() for p in built.parameters()) == parameters


def test_older_names_of_dense_layers_are_read(tmp_path):
    torch.manual_seed(0)
    net = DenseNet((1, 2), growth=3, width=4, classes=3)
    save_network(tmp_path / "new.safetensors", net)
    older = {
        k.replace(".norm1.", ".norm.1.").replace(".norm2.", ".norm.2.").replace(".conv1.", ".conv.1.")
        .replace(".conv2.", ".conv.2."): v
        for k, v in net.state_dict().items() if "num_batches" not in k
    }  # fmt: skip
    older = {k.replace("features.norm.", "features.norm"): v for k, v in older.items()}
    assert sum("denselayer" in k and ".norm.1." in k for k in older) == 12
    save_file({k: v.contiguous() for k, v in older.items()}, tmp_path / "old.safetensors")
    x = torch.rand(2, 3, 40, 40)
    new, old = (
        Standardised(load_weights(DenseNet((1, 2), growth=3, width=4, classes=3), tmp_path / f"{name}.safetensors"))(x)
        for name in ("new", "old")
    )
    assert torch.equal(new, old)


@pytest.mark.parametrize("make", [*small_classifiers().values(), *SMALL_UPSCALERS.values()])
def test_published_networks_are_their_linear_systems(make):
    torch.manual_seed(1)
    net = make().double().eval()
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.running_mean, std=0.3)
            torch.nn.init.uniform_(part.running_var, 0.5, 2)
    x = torch.rand(2, 3, *((64, 64) if hasattr(net, "avgpool") else (8, 9)), dtype=torch.float64)
    scope = LinearInterpreter(net, x)
    torch.testing.assert_close(scope.linear_part + scope.residual, net(x).detach(), rtol=1e-11, atol=1e-11)
    v = torch.randn(1, *x.shape, dtype=torch.float64)
    torch.testing.assert_close(scope.matvec(-3 * v), -3 * scope.matvec(v), rtol=1e-10, atol=1e-12)
    w = torch.randn(1, *scope.output.shape, dtype=torch.float64)
    torch.testing.assert_close((scope.matvec(v) * w).sum(), (v * scope.rmatvec(w)).sum(), rtol=1e-9, atol=1e-11)
    if not isinstance(net, RCAN):  # the others are piecewise linear, and F is the Jacobian
        (J,) = torch.autograd.grad((net(y := x.clone().requires_grad_()) * w[0]).sum(), y)
        torch.testing.assert_close(scope.rmatvec(w)[0], J, rtol=1e-9, atol=1e-11)


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
    write_study(tmp_path, count=0)
    with pytest.raises(MissingData, match="no JPEG or PNG"):
        paper.super_resolution(Run(scale="paper", seeds=(0,), data=tmp_path), networks=SMALL_UPSCALERS)
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(tmp_path / "urban100/one.png")
    with pytest.raises(ValueError, match="does not hold the weights of EDSR"):
        paper.full_study(Run(scale="paper", seeds=(0,), data=tmp_path))
    (tmp_path / "noise.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_weights(EDSR(4, 1), tmp_path / "noise.safetensors")
    Image.fromarray(np.zeros((40, 300, 3), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="at least 192"):
        paper.read_image(tmp_path / "small.png", 192)
