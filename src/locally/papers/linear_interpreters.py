"""What classifying, upscaling and inpainting networks are at one input, beside captum, the Jacobian and bicubic.

All networks are trained here, on scikit-learn's digits and photographs. The full-size study takes published weights.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from locally.evidence import MissingData, Run
from locally.plots import PALETTE, canvas
from locally.tangent.interpreter import SVD, LinearInterpreter, band, gaze, support, template_share

OURS = "linear interpreter"
ERROR = "relative reconstruction error"
HELD_OUT = 107  # bottom rows of each photograph, never trained on
GAP, SHIFT = 5, 8  # width of the gap, and how far to its left stands what belongs there
SUPPORT = "median support of singular images / that of bicubic upscaling"
COPIED = "gap rows whose largest weight is on the pixel to be copied"


@dataclass(frozen=True)
class Study:
    """Networks a seed and how long they train; how many singular images are looked at, on squares of which side."""

    classifiers: int
    epochs: int
    upscalers: int
    upscaling_steps: int
    inpainting_steps: int
    images: int
    side: int


QUICK, DEFAULT = Study(1, 2, 1, 20, 20, 16, 12), Study(2, 12, 2, 600, 300, 64, 20)


def experiment(run: Run) -> None:
    run.pick(quick=carry_out, default=carry_out, paper=full_study)(run)


def carry_out(run: Run) -> None:
    run.parallel(all_networks, run.seeds, "networks")
    draw_bias_reliance(run)


def all_networks(run: Run, seed: int) -> None:
    study = run.pick(quick=QUICK, default=DEFAULT, paper=DEFAULT)
    photographs = load_photographs()
    for study_of in run.track((classification, upscaling, inpainting), "networks"):
        study_of(run, study, photographs, seed, draw=seed == run.seeds[0])


# Classification ------------------------------------------------------------------------------------------------------


def classification(run: Run, study: Study, _photographs: list[Tensor], seed: int, *, draw: bool) -> None:
    for k in range(study.classifiers):  # what biases carry differs much between networks: several a seed
        classifier(run, study.epochs, seed, k, draw=draw and k == 0)


def classifier(run: Run, epochs: int, seed: int, k: int, *, draw: bool) -> None:
    X, y, test, truth = load_digits(seed)
    net = train_classifier(X, y, epochs, 1000 * k + seed).to(run.device)
    test, truth = test.to(run.device), truth.to(run.device)
    scope = LinearInterpreter(net, test)
    record_error(run, scope, seed, f"digits {k}")

    def record(method: str, metric: str, value: float) -> None:
        run.record(method, metric, value, seed=seed, network=f"digits {k}")

    right = lambda scores: float((scores.argmax(1) == truth).double().mean())
    record("network", "accuracy", right(scope.output))
    record(OURS, "accuracy of the residual alone", right(scope.residual))
    record(OURS, "accuracy of the linear part alone", right(scope.linear_part))
    record(OURS, "share of the residual in centred scores", float(scope.residual_share().mean()))
    record(OURS, "accuracy of a linear classifier on the residual", read_class(scope.residual, truth))
    with torch.no_grad():
        record("network, biases set to zero", "accuracy", right(without_biases(net)(test)))

    few = LinearInterpreter(net, test[:32])
    votes = few.votes()
    lost = (votes.pixels.flatten(1).sum(1) + votes.bias - votes.score).abs().max() / votes.score.abs().max()
    record(OURS, "votes that do not add up to the score", float(lost))
    for path, part in few.residual_by_layer().items():
        size = (part - part.mean(1, keepdim=True)).norm(dim=1).mean()
        record(f"biases of layer {path}", "size of centred contribution", float(size))
    theirs = input_x_gradient(net, test[:32])
    if theirs is not None:
        gap = (votes.pixels - theirs).norm() / theirs.norm()
        record("captum, input x gradient", "relative difference to the votes", float(gap))
    if draw:
        draw_votes(run, few)


def load_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits as digits
    from sklearn.model_selection import train_test_split

    X, y = digits(return_X_y=True)
    parts = train_test_split(X.reshape(-1, 1, 8, 8) / 16, y, test_size=497, random_state=seed, stratify=y)
    train, test = (torch.as_tensor(p, dtype=torch.float32) for p in parts[:2])
    return train, torch.as_tensor(parts[2]), test, torch.as_tensor(parts[3])


def train_classifier(X: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    rows = [r for _ in range(epochs) for r in torch.randperm(len(X), generator=order).split(64)]
    fit(net, len(rows), 2e-3, lambda i: F.cross_entropy(net(X[rows[i]]), y[rows[i]]))
    return net


def read_class(residual: Tensor, truth: Tensor) -> float:
    """Accuracy on one half of the test images of logistic regression fitted on the other: is the class in r at all?"""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    r, y = residual.cpu().numpy(), truth.cpu().numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(r[::2], y[::2])
    return float(probe.score(r[1::2], y[1::2]))


def without_biases(net: nn.Module) -> nn.Module:
    bare = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in bare.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    return bare


def input_x_gradient(net: nn.Module, x: Tensor) -> Tensor | None:
    """The same from captum; None where it is not installed."""
    try:
        from captum.attr import InputXGradient
    except ImportError:
        return None
    with torch.no_grad():
        best = net(x).argmax(1)
    return InputXGradient(net).attribute(x.clone().requires_grad_(), target=best).detach()


# Super-resolution ----------------------------------------------------------------------------------------------------


def upscaling(run: Run, study: Study, photographs: list[Tensor], seed: int, *, draw: bool) -> None:
    strips = [p[None, :, -HELD_OUT + 1 :].to(run.device) for p in photographs]
    crops = torch.cat([halved(s)[..., 10 : 10 + study.side, at : at + study.side] for s in strips for at in (60, 200)])
    bicubic = nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False)
    theirs = LinearInterpreter(bicubic, crops[:1]).svd(study.images, method="dense")
    for k in range(study.upscalers):
        net = train_upscaler(photographs, study.upscaling_steps, 1000 * k + seed).to(run.device)
        for name, strip in zip(("china", "flower"), strips):
            with torch.no_grad():
                for method, upscale in (("network", net), ("bicubic", bicubic)):
                    quality = psnr(upscale(halved(strip)), strip)
                    run.record(method, "PSNR, dB", quality, seed=seed, image=name, network=f"upscaler {k}")
        scope = LinearInterpreter(net, crops)
        ours = scope.svd(study.images, method="dense")
        upscaler(run, scope, ours, theirs, seed, f"upscaler {k}")
        if draw and k == 0:
            draw_filters(run, scope, crops)
            draw_singular_images(run, ours.V[0, :, 0], theirs.V[0, :, 0])


def upscaler(run: Run, scope: LinearInterpreter, ours: SVD, theirs: SVD, seed: int, network: str) -> None:
    record_error(run, scope, seed, network)
    share = scope.residual.flatten(1).norm(dim=1) / scope.output.flatten(1).norm(dim=1)
    run.record(OURS, "residual / output", float(share.median()), seed=seed, network=network)
    gain = scope.matvec(torch.ones_like(scope.x))[..., 10:-10, 10:-10]  # padding takes its share at the border
    run.record(OURS, "answer to a constant image", float(gain.mean((1, 2, 3)).median()), seed=seed, network=network)
    for side, mine, other in (("input", ours.V, theirs.V), ("output", ours.U, theirs.U)):
        spread = support(mine[:, :, 0]).median(1).values / support(other[:, :, 0]).median(1).values
        run.record(OURS, SUPPORT, float(spread.median()), seed=seed, side=side, network=network)
        for name, images in ((OURS, mine), ("bicubic", other)):
            waves = float((band(images[:, 4:, 0]).constant_share < 0.05).double().mean())
            run.record(name, "singular images that are band-pass", waves, seed=seed, side=side, network=network)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def train_upscaler(photographs: list[Tensor], steps: int, seed: int, width: int = 12) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), Residual(width), Residual(width),
            nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
    patches = Patches(photographs, 24, seed)

    def loss(_: int) -> Tensor:
        sharp = patches.draw(8)
        return (net(halved(sharp)) - sharp).abs().mean()

    fit(net, steps, 4e-3, loss)
    return net


def halved(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c _ _"]:
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean()))


# Image to image ------------------------------------------------------------------------------------------------------


def inpainting(run: Run, study: Study, photographs: list[Tensor], seed: int, *, draw: bool) -> None:
    """A network that fills a gap with what stands SHIFT pixels to its left: do its rows show where it copies from?"""
    net = train_inpainter(photographs, study.inpainting_steps, seed).to(run.device)
    strips = [p[None, :, -HELD_OUT:] for p in photographs]
    squares = torch.cat([s[..., 40:72, at : at + 32] for s in strips for at in (60, 200, 400)]).to(run.device)
    x, whole = torn(squares, left=16)
    scope = LinearInterpreter(net, x)
    record_error(run, scope, seed, "inpainting")
    gap = (scope.output - whole)[..., 16 : 16 + GAP].square().mean().sqrt()
    run.record("network", "error in the gap", float(gap), seed=seed)
    run.record("gap filled with its mean", "error in the gap", float(whole[..., 16 : 16 + GAP].std()), seed=seed)

    places = [(i, j) for i in range(4, 28) for j in range(17, 15 + GAP)]
    picked = torch.zeros(len(places), *scope.output.shape, device=x.device)
    for k, (i, j) in enumerate(places):
        picked[k, :, 0, i, j] = 1
    visible = scope.rmatvec(picked)[:, :, 0].abs()
    visible[..., 16 : 16 + GAP] = 0  # what stands in the gap is zero and gives nothing
    sources = torch.tensor([32 * i + j - SHIFT for i, j in places], device=x.device)
    found = visible.flatten(2).argmax(2) == sources[:, None]
    run.record(OURS, COPIED, float(found.double().mean()), seed=seed)
    at = torch.tensor(places, dtype=x.dtype, device=x.device)[:, None].expand(-1, len(x), 2)
    run.record(OURS, "distance that gap rows look at", float(gaze(visible, at).mean_distance.mean()), seed=seed)
    share = template_share(scope.residual, scope.linear_part)[:, 0]
    for name, columns in (("gap", slice(16, 16 + GAP)), ("elsewhere", slice(2, 15))):
        run.record(OURS, "template share", float(share[..., columns].mean()), seed=seed, place=name)
    if draw:
        draw_inpainting(run, scope, whole)


def torn(images: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Images with a black gap from column `left` on, and what the network is to make of them."""
    whole = images.clone()
    whole[..., left : left + GAP] = images[..., left - SHIFT : left - SHIFT + GAP]
    x = whole.clone()
    x[..., left : left + GAP] = 0
    return x, whole


class Correction(nn.Module):
    """x plus what convolutions make of it; the dilated one sees SHIFT pixels far."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=SHIFT, dilation=SHIFT),
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def train_inpainter(photographs: list[Tensor], steps: int, seed: int) -> Correction:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Correction()
    patches = Patches(photographs, 32, seed)

    def loss(_: int) -> Tensor:
        left = SHIFT + patches.corner(1, 32 - GAP - SHIFT)[1]
        x, whole = torn(patches.draw(16), left)
        error = (net(x) - whole).abs()
        return error.mean() + error[..., left : left + GAP].mean()

    fit(net, steps, 5e-3, loss)
    return net


# What they share -----------------------------------------------------------------------------------------------------


class Patches:
    """Random grey squares of the photographs, without the rows that are held out."""

    def __init__(self, photographs: list[Tensor], size: int, seed: int) -> None:
        self.photographs, self.size = photographs, size
        self.generator = torch.Generator().manual_seed(seed)

    def corner(self, rows: int, columns: int) -> tuple[int, int]:
        pick = lambda n: int(torch.randint(n, (1,), generator=self.generator))
        return pick(rows), pick(columns)

    def draw(self, count: int) -> Float[Tensor, "count 1 size size"]:
        patches = []
        for i in range(count):
            image = self.photographs[i % len(self.photographs)]
            top, left = self.corner(image.shape[1] - HELD_OUT - self.size, image.shape[2] - self.size)
            patches.append(image[:, top : top + self.size, left : left + self.size])
        return torch.stack(patches)


def load_photographs() -> list[Float[Tensor, "1 h w"]]:
    from sklearn.datasets import load_sample_images

    return [torch.as_tensor(i / 255, dtype=torch.float32).mean(2)[None] for i in load_sample_images().images]


def fit(net: nn.Module, steps: int, rate: float, loss: Callable[[int], Tensor]) -> None:
    """Adam with one cycle of the rate; leaves the network in evaluation mode."""
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for i in range(steps):
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def record_error(run: Run, scope: LinearInterpreter, seed: int | None, network: str) -> None:
    error = (scope.linear_part + scope.residual - scope.output).norm() / scope.output.norm()
    run.record(OURS, ERROR, float(error), seed=seed, network=network)


# Figures -------------------------------------------------------------------------------------------------------------


def show(axes: Any, image: Tensor, title: str = "", *, signed: bool = True, limit: float | None = None) -> None:
    picture = image.detach().cpu().numpy()
    if signed:
        limit = limit or float(abs(picture).max()) or 1.0
        axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    else:
        axes.imshow(picture, cmap="gray", vmin=picture.min(), vmax=picture.max(), interpolation="nearest")
    axes.set_title(title, fontsize=8, y=1.0)  # a fixed place: finding one costs more than the picture
    axes.set(xticks=[], yticks=[])
    axes.set_axis_off()


def draw_votes(run: Run, scope: LinearInterpreter) -> None:
    """Three digits: who votes for the winner, who for the runner-up."""
    figure, axes = canvas(7.6, 4.4, nrows=3, ncols=6)
    top = scope.output.topk(2, dim=1).indices
    pair = [scope.votes(top[:, i]) for i in range(2)]
    margin = (scope.output.gather(1, top) * torch.tensor([1.0, -1.0], device=top.device)).sum(1)
    for row, n in zip(axes, margin.argsort()[:3].tolist()):  # the closest calls
        show(row[0], scope.x[n, 0], "input", signed=False)
        limit = max(float(v.image()[n].abs().max()) for v in pair)
        for i, votes in enumerate(pair):
            placed, rest = votes.bias_image()
            cells = row[1 + 2 * i : 3 + 2 * i]
            pixels = votes.pixels[n].sum(0)
            show(cells[0], pixels, f"pixels for {int(top[n, i])}: {float(pixels.sum()):+.1f}", limit=limit)
            show(cells[1], placed[n], f"biases: {float(placed[n].sum()):+.1f}, rest {float(rest[n]):+.1f}", limit=limit)
        winner, other = (f"{int(top[n, i])}: {float(pair[i].score[n]):.1f}" for i in range(2))
        show(row[5], pair[0].image()[n] - pair[1].image()[n], f"{winner} over {other}")
    caption = (
        "Votes of pixels and of convolution biases, where they are added, for the best two classes of the closest "
        "calls. Red votes for, blue against; all, with those of biases without a place (rest), add up to the score."
    )
    run.figure(figure, "Votes on digits", caption)


def draw_bias_reliance(run: Run) -> None:
    names = {
        ("network", "accuracy"): "network",
        (OURS, "accuracy of the linear part alone"): "F x alone",
        (OURS, "accuracy of the residual alone"): "r alone",
        ("network, biases set to zero", "accuracy"): "network without biases",
    }
    figure, axes = canvas(6.4, 2.4)
    first = [m for m in run.measures if m.seed == run.seeds[0] and m.setting.get("network") == "digits 0"]
    values = {names[m.method, m.metric]: m.value for m in first if (m.method, m.metric) in names}
    axes.barh(list(values), list(values.values()), color=PALETTE[: len(values)], alpha=0.7, height=0.6)
    axes.axvline(0.1, color="#888888", linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on digits (dotted: chance)", xlim=(0, 1))
    run.figure(
        figure, "What the biases carry", "First seed. r holds all biases, gated by the units that the input opened."
    )


def draw_filters(run: Run, scope: LinearInterpreter, crops: Tensor) -> None:
    """Impulse responses and rows of the upscaler where the crop has an edge and where it is smooth."""
    figure, axes = canvas(7.2, 3.2, nrows=2, ncols=5)
    n = int(crops.flatten(1).std(1).argmax())
    image = crops[n, 0]
    slope = (image[1:-1, 2:] - image[1:-1, :-2]).square() + (image[2:, 1:-1] - image[:-2, 1:-1]).square()
    inner = slope[3:-3, 3:-3]
    show(axes[0][0], image, "input", signed=False)
    show(axes[1][0], scope.output[n, 0], "output", signed=False)
    for k, (what, spot) in enumerate((("an edge", inner.argmax()), ("a smooth place", inner.argmin()))):
        i, j = (c + 4 for c in divmod(int(spot), inner.shape[1]))
        axes[0][0].plot(j, i, "os"[k], markersize=5, color=PALETTE[1], fillstyle="none")
        column = scope.column((0, i, j))[n, 0, 2 * i - 7 : 2 * i + 9, 2 * j - 7 : 2 * j + 9]
        row = scope.row((0, 2 * i, 2 * j))[n, 0, i - 4 : i + 5, j - 4 : j + 5]
        show(axes[0][1 + k], column, f"column, {what}")
        show(axes[1][1 + k], row, f"row, {what}")
    show(axes[0][3], scope.linear_part[n, 0], "F x", signed=False)
    show(axes[1][3], scope.residual[n, 0], "r")
    fixed = LinearInterpreter(nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False), crops[n : n + 1])
    show(axes[0][4], fixed.column((0, 6, 6))[0, 0, 5:21, 5:21], "column, bicubic")
    show(axes[1][4], fixed.row((0, 12, 12))[0, 0, 2:11, 2:11], "row, bicubic")
    caption = (
        "Columns of F are the filters with which the network draws one input pixel, rows what one output pixel is made "
        "of. They bend with the image (circle: an edge, square: a smooth place), those of bicubic upscaling do not."
    )
    run.figure(figure, "Filters of a super-resolution network", caption)


def draw_singular_images(run: Run, ours: Float[Tensor, "k h w"], theirs: Float[Tensor, "k h w"]) -> None:
    figure, axes = canvas(8.4, 3.4, nrows=3, ncols=8)
    count = len(ours)
    chosen = [round((count - 1) * (i / 7) ** 1.5) for i in range(8)]  # more of the first ones
    spread = support(ours), support(theirs)
    local = support(ours).argsort()[:8].tolist()
    for i, cell in zip(chosen, axes[0]):
        show(cell, ours[i], f"network {i + 1}: {float(spread[0][i]):.2f}")
    for i, cell in zip(sorted(local), axes[1]):
        show(cell, ours[i], f"network {i + 1}: {float(spread[0][i]):.2f}")
    for i, cell in zip(chosen, axes[2]):
        show(cell, theirs[i], f"bicubic {i + 1}: {float(spread[1][i]):.2f}")
    caption = (
        "Input images that the upscalers pass on best, by rank, with the fraction of the pixels that they are spread "
        "over. Middle row: the network's most local ones. Those of bicubic upscaling are waves over the whole crop."
    )
    run.figure(figure, "Singular images", caption)


def draw_inpainting(run: Run, scope: LinearInterpreter, whole: Tensor) -> None:
    figure, axes = canvas(7.2, 3.0, nrows=2, ncols=5)
    for line, n in zip(axes, (0, 4)):
        show(line[0], scope.x[n, 0], "input", signed=False)
        show(line[1], scope.output[n, 0], "output", signed=False)
        show(line[2], whole[n, 0], "what belongs there", signed=False)
        row = scope.row((0, 16, 18))[n, 0]
        row[:, 16 : 16 + GAP] = 0
        show(line[3], row, "row in the gap")
        line[3].plot(18, 16, "x", color="black", markersize=4)
        line[3].plot(18 - SHIFT, 16, "o", color="black", markersize=7, fillstyle="none")
        show(line[4], scope.row((0, 16, 8))[n, 0], "row elsewhere")
        line[4].plot(8, 16, "x", color="black", markersize=4)
    caption = (
        "A network that fills a gap by copying. Rows: what the output at the cross is made of, visible pixels only. In "
        "the gap the largest weight is to stand on the pixel to be copied (circle); elsewhere it is the pixel itself."
    )
    run.figure(figure, "Copying, seen in rows", caption)


# Full size -----------------------------------------------------------------------------------------------------------


class EDSR(nn.Module):
    """The baseline of Lim et al. (CVPR workshops 2017) for x4, with the parameter names of its published weights."""

    def __init__(self, width: int = 64, blocks: int = 16) -> None:
        super().__init__()
        conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1)
        self.mean: Tensor
        self.register_buffer("mean", 255 * torch.tensor([0.4488, 0.4371, 0.4040])[:, None, None], persistent=False)
        self.head = nn.Sequential(conv(3, width))
        self.body = nn.Sequential(*(EDSRBlock(width) for _ in range(blocks)), conv(width, width))
        up = [m for _ in range(2) for m in (conv(width, 4 * width), nn.PixelShuffle(2))]
        self.tail = nn.Sequential(nn.Sequential(*up), conv(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(255 * x - self.mean)
        return (self.tail(x + self.body(x)) + self.mean) / 255


class EDSRBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def full_study(run: Run, *, crop: int = 48, count: int = 64, width: int = 64, blocks: int = 16) -> None:
    """EDSR x4 on the centres of Urban100; seeds choose the images, ten each.

    Reads edsr/edsr_baseline_x4.safetensors (the published weights, with their names) and urban100/*.png.
    """
    net = load_edsr(run.data("edsr/edsr_baseline_x4.safetensors", "EDSR weights"), width, blocks).to(run.device)
    folder = run.data("urban100", "the images of Urban100")
    files = sorted(folder.glob("*.png"))
    if not files:
        raise MissingData(f"{folder} holds no PNG files: this scale reads the images of Urban100 there")
    bicubic = nn.Upsample(scale_factor=4, mode="bicubic", align_corners=False)
    for seed in run.track(run.seeds, "seeds"):
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:10].tolist()
        for i in run.track(order, "images"):
            x = centre(files[i], 4 * crop).to(run.device)
            x = F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True, align_corners=False)
            scope = LinearInterpreter(net, x)
            record_error(run, scope, seed, "EDSR")
            generator = torch.Generator().manual_seed(seed)
            ours, theirs = (s.svd(count, generator=generator) for s in (scope, LinearInterpreter(bicubic, x)))
            spread = [float(support(grey(found.V[0])).median()) for found in (ours, theirs)]
            run.record(OURS, f"{SUPPORT}, EDSR", spread[0] / spread[1], seed=seed, image=files[i].stem)
            run.record(
                OURS, "residual / output", float(scope.residual.norm() / scope.output.norm()), seed=seed, network="EDSR"
            )
            if seed == run.seeds[0] and i == order[0]:
                draw_singular_images(run, grey(ours.V[0]), grey(theirs.V[0]))


def load_edsr(path: Path, width: int, blocks: int) -> EDSR:
    """Raises ValueError where the file's tensors are not those of the network."""
    from safetensors.torch import load_file

    net = EDSR(width, blocks)
    state = {k: v for k, v in load_file(path).items() if not k.startswith(("sub_mean", "add_mean"))}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of EDSR x4: {error}") from error
    return net.eval()


def centre(path: Path, size: int) -> Float[Tensor, "1 3 size size"]:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = torch.as_tensor(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    if min(pixels.shape[1:]) < size:
        raise ValueError(f"{path} must be at least {size} x {size} pixels, got {tuple(pixels.shape[1:])}")
    top, left = ((s - size) // 2 for s in pixels.shape[1:])
    return pixels[None, :, top : top + size, left : left + size]


def grey(images: Float[Tensor, "k 3 h w"]) -> Float[Tensor, "k h w"]:
    """The channel with the most energy."""
    channel = images.square().sum((2, 3)).argmax(1)
    return images[torch.arange(len(images)), channel]
