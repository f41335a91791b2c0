"""What classifying, upscaling and inpainting networks are at one input, beside captum, the Jacobian and bicubic.

All networks are trained here, on scikit-learn's digits and photographs. The full-size study takes published weights.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from locally.evidence import MissingData, Run
from locally.plots import PALETTE, canvas
from locally.tangent.interpreter import SVD, LinearInterpreter, band, gaze, published, support, template_share
from locally.tangent.interpreter.figures import plot_copies, plot_filters, plot_singular_images, plot_votes
from locally.tangent.interpreter.images import (
    drawn,
    grey,
    halved,
    image_files,
    labelled_images,
    load_photographs,
    psnr,
    read_image,
)
from locally.tangent.interpreter.small_networks import (
    GAP,
    HELD_OUT,
    SHIFT,
    torn,
    train_classifier,
    train_inpainter,
    train_upscaler,
)

OURS = "linear interpreter"
ERROR = "relative reconstruction error"
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
        run.figure(plot_votes(few), "Votes on digits", VOTES_CAPTION)


def load_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits as digits
    from sklearn.model_selection import train_test_split

    X, y = digits(return_X_y=True)
    parts = train_test_split(X.reshape(-1, 1, 8, 8) / 16, y, test_size=497, random_state=seed, stratify=y)
    train, test = (torch.as_tensor(p, dtype=torch.float32) for p in parts[:2])
    return train, torch.as_tensor(parts[2]), test, torch.as_tensor(parts[3])


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
            draw_filters(run, scope)
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


# What they share -----------------------------------------------------------------------------------------------------


def record_error(run: Run, scope: LinearInterpreter, seed: int | None, network: str) -> None:
    error = (scope.linear_part + scope.residual - scope.output).norm() / scope.output.norm()
    run.record(OURS, ERROR, float(error), seed=seed, network=network)


# Figures -------------------------------------------------------------------------------------------------------------

VOTES_CAPTION = (
    "Votes of pixels and of convolution biases, where they are added, for the best two classes of the closest "
    "calls. Red votes for, blue against; all, with those of biases without a place (rest), add up to the score."
)


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
    caption = "First seed. r holds all biases, gated by the units that the input opened."
    run.figure(figure, "What the biases carry", caption)


def draw_filters(run: Run, scope: LinearInterpreter) -> None:
    caption = (
        "Columns of F are the filters with which the network draws one input pixel, rows what one output pixel is made "
        "of. They bend with the image (circle: an edge, square: a smooth place), those of bicubic upscaling do not."
    )
    run.figure(plot_filters(scope), "Filters of a super-resolution network", caption)


def draw_singular_images(
    run: Run, ours: Float[Tensor, "k h w"], theirs: Float[Tensor, "k h w"], name: str = "Singular images"
) -> None:
    caption = (
        "Input images that the upscalers pass on best, by rank, with the fraction of the pixels that they are spread "
        "over. Middle row: the network's most local ones. Those of bicubic upscaling are waves over the whole crop."
    )
    run.figure(plot_singular_images(ours, theirs), name, caption)


def draw_inpainting(run: Run, scope: LinearInterpreter, whole: Tensor) -> None:
    caption = (
        "A network that fills a gap by copying. Rows: what the output at the cross is made of, visible pixels only. In "
        "the gap the largest weight is to stand on the pixel to be copied (circle); elsewhere it is the pixel itself."
    )
    run.figure(plot_copies(scope, whole, GAP, SHIFT), "Copying, seen in rows", caption)


# Full size -----------------------------------------------------------------------------------------------------------


def full_study(run: Run) -> None:
    """Published networks on the user's images, those that are there (the first is missed); then the default study."""
    studies: dict[str, Callable[[Run], None]] = {
        **dict.fromkeys(("edsr", "rcan"), super_resolution),
        "imagenet": image_classifiers,
        "cyclegan": horses_and_zebras,
    }
    here = [name for name in studies if run.data_folder is not None and (run.data_folder / name).is_dir()]
    chosen = here or list(studies)  # without any, the first says what is missing
    for study in dict.fromkeys(studies[name] for name in chosen):
        study(run)
    carry_out(run)


def super_resolution(
    run: Run, *, crop: int = 48, count: int = 64, networks: dict[str, Callable[[], nn.Module]] | None = None
) -> None:
    """EDSR and RCAN x4 on the centres of Urban100; seeds choose the images, ten each.

    Reads edsr/edsr_baseline_x4.safetensors and rcan/RCAN_BIX4.safetensors (the published weights, with their names;
    one of them is enough) and urban100/*.png.
    """
    networks = networks or {"EDSR": published.EDSR, "RCAN": published.RCAN}
    files = {"EDSR": "edsr/edsr_baseline_x4", "RCAN": "rcan/RCAN_BIX4"}
    weights = there(run, {name: (f"{files[name]}.safetensors", f"{name} weights") for name in networks})
    images = images_in(run, "urban100", "the images of Urban100")
    bicubic = nn.Upsample(scale_factor=4, mode="bicubic", align_corners=False)
    for name, path in weights.items():
        net = published.load_weights(networks[name](), path, ignore=("sub_mean", "add_mean")).to(run.device)
        for seed in run.track(run.seeds, f"seeds of {name}"):
            order = drawn(len(images), seed)
            for i in run.track(order, "images"):
                x = read_image(images[i], 4 * crop).to(run.device)
                x = F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True, align_corners=False)
                scope = LinearInterpreter(net, x)
                record_error(run, scope, seed, name)
                generator = torch.Generator().manual_seed(seed)
                ours, theirs = (s.svd(count, generator=generator) for s in (scope, LinearInterpreter(bicubic, x)))
                spread = [float(support(grey(found.V[0])).median()) for found in (ours, theirs)]
                run.record(OURS, f"{SUPPORT}, {name}", spread[0] / spread[1], seed=seed, image=images[i].stem)
                share = float(scope.residual.norm() / scope.output.norm())
                run.record(OURS, "residual / output", share, seed=seed, network=name, image=images[i].stem)
                if seed == run.seeds[0] and i == order[0]:
                    draw_singular_images(run, grey(ours.V[0]), grey(theirs.V[0]), f"Singular images, {name}")


def image_classifiers(
    run: Run, *, size: int = 224, short: int = 256, networks: dict[str, Callable[[], nn.Module]] | None = None
) -> None:
    """AlexNet, VGG19, ResNet152 and DenseNet121 on ImageNet's validation images; seeds choose them, fifty each.

    Reads imagenet/<alexnet, vgg19, resnet152, densenet121>.safetensors (the published weights, with their names; one
    of them is enough) and imagenet/val/<class>/*.JPEG; classes are numbered by the names of their folders, in order.
    """
    folder = run.data("imagenet/val", "ImageNet's validation images, a folder for each class")
    files, classes = labelled_images(folder)
    networks = networks or published.CLASSIFIERS
    weights = there(run, {name: (f"imagenet/{name}.safetensors", f"weights of {name}") for name in networks})
    for name, path in weights.items():
        net = published.Standardised(published.load_weights(networks[name](), path)).to(run.device).eval()
        for seed in run.track(run.seeds, f"seeds of {name}"):
            order = drawn(len(files), seed, 50)
            for i in run.track(order, "images"):
                image, truth = files[i]
                scope = LinearInterpreter(net, read_image(image, size, short=short).to(run.device))
                if scope.output.shape[1] != len(classes):
                    raise ValueError(f"{name} has {scope.output.shape[1]} classes, {folder} {len(classes)} folders")
                record_error(run, scope, seed, name)
                setting: dict[str, Any] = {"seed": seed, "network": name, "image": image.stem}
                for method, scores in (
                    ("network", scope.output), ("residual alone", scope.residual), ("F x alone", scope.linear_part)
                ):  # fmt: skip
                    run.record(method, "accuracy, ImageNet", float(scores.argmax() == truth), **setting)
                share = float(scope.residual_share())
                run.record(OURS, "share of the residual in centred scores, ImageNet", share, **setting)
                if seed == run.seeds[0] and i == order[0]:
                    run.figure(plot_votes(scope, 1), f"Votes on an image, {name}", VOTES_CAPTION)


def horses_and_zebras(run: Run, *, size: int = 256, width: int = 64, blocks: int = 9, rows: int = 16) -> None:
    """CycleGAN's two generators on the test images of both sides: how far rows look, and what the residual carries.

    Reads cyclegan/A2B.safetensors and cyclegan/B2A.safetensors (published weights, with their names), and images in
    cyclegan/testA and cyclegan/testB.
    """
    for side, other in ("AB", "BA"):
        path = run.data(f"cyclegan/{side}2{other}.safetensors", f"weights of the generator from {side} to {other}")
        net = published.load_weights(published.CycleGenerator(width, blocks), path).to(run.device)
        files = images_in(run, f"cyclegan/test{side}", f"test images of side {side}")
        for seed in run.track(run.seeds, f"seeds, {side} to {other}"):
            generator = torch.Generator().manual_seed(seed)
            for i in run.track(drawn(len(files), seed), "images"):
                scope = LinearInterpreter(net, 2 * read_image(files[i], size, short=size).to(run.device) - 1)
                record_error(run, scope, seed, f"{side}2{other}")
                setting: dict[str, Any] = {"seed": seed, "network": f"{side}2{other}", "image": files[i].stem}
                share = template_share(scope.residual, scope.linear_part)
                run.record(OURS, "template share, CycleGAN", float(share.mean()), **setting)
                at = torch.randint(size, (rows, 2), generator=generator).to(run.device)
                picked = torch.zeros(rows, *scope.output.shape, device=run.device)
                picked[torch.arange(rows), 0, :, at[:, 0], at[:, 1]] = 1 / 3  # the grey value at a random place
                found = gaze(scope.rmatvec(picked)[:, 0].abs().mean(1)[:, None], at[:, None].to(picked.dtype))
                run.record(OURS, "distance that rows look at, CycleGAN", float(found.mean_distance.mean()), **setting)


def there(run: Run, files: dict[str, tuple[str, str]]) -> dict[str, Path]:
    """Those that the user's folder holds, of relative paths and what they are; without any, the first is missed."""
    found = {}
    for name, (relative, what) in files.items():
        with suppress(MissingData):
            found[name] = run.data(relative, what)
    if not found:
        run.data(*next(iter(files.values())))
    return found


def images_in(run: Run, relative: str, what: str) -> list[Path]:
    folder = run.data(relative, what)
    try:
        return image_files(folder)
    except ValueError as error:
        raise MissingData(f"{error}: this scale reads {what} there") from error
