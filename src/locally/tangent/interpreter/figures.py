"""Pictures of linear systems: votes on classes, filters of an upscaler, singular images."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locally.tangent.interpreter.analysis import support
from locally.tangent.interpreter.system import LinearInterpreter


def show(axes: Any, image: Tensor, title: str = "", *, signed: bool = True, limit: float | None = None) -> None:
    """One picture (h, w) in Matplotlib axes without ticks; red is positive, blue negative, or grey if not signed."""
    picture = image.detach().cpu().numpy()
    if signed:
        limit = limit or float(abs(picture).max()) or 1.0
        axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    else:
        axes.imshow(picture, cmap="gray", vmin=picture.min(), vmax=picture.max(), interpolation="nearest")
    axes.set_title(title, fontsize=8, y=1.0)  # a fixed place: finding one costs more than the picture
    axes.set(xticks=[], yticks=[])
    axes.set_axis_off()


def plot_votes(scope: LinearInterpreter, count: int = 3) -> Any:
    """For the `count` closest calls of a classifier: who votes for the winner, who for the runner-up."""
    from locally.plots import canvas

    figure, axes = canvas(7.6, 1.4 * count + 0.2, nrows=count, ncols=6, squeeze=False)
    top = scope.output.topk(2, dim=1).indices
    pair = [scope.votes(top[:, i]) for i in range(2)]
    margin = (scope.output.gather(1, top) * torch.tensor([1.0, -1.0], device=top.device)).sum(1)
    for row, n in zip(axes, margin.argsort()[:count].tolist()):
        show(row[0], scope.x[n].mean(0), "input", signed=False)
        limit = max(float(v.image()[n].abs().max()) for v in pair)
        for i, votes in enumerate(pair):
            placed, rest = votes.bias_image()
            cells = row[1 + 2 * i : 3 + 2 * i]
            pixels = votes.pixels[n].sum(0)
            show(cells[0], pixels, f"pixels for {int(top[n, i])}: {float(pixels.sum()):+.1f}", limit=limit)
            show(cells[1], placed[n], f"biases: {float(placed[n].sum()):+.1f}, rest {float(rest[n]):+.1f}", limit=limit)
        winner, other = (f"{int(top[n, i])}: {float(pair[i].score[n]):.1f}" for i in range(2))
        show(row[5], pair[0].image()[n] - pair[1].image()[n], f"{winner} over {other}")
    return figure


def plot_filters(scope: LinearInterpreter) -> Any:
    """Impulse responses and rows of a grey upscaler by two, at an edge of its sharpest input and where that is smooth.

    Beside those of bicubic upscaling, which do not bend with the image.
    """
    from locally.plots import PALETTE, canvas

    figure, axes = canvas(7.2, 3.2, nrows=2, ncols=5)
    n = int(scope.x.flatten(1).std(1).argmax())
    image = scope.x[n, 0]
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
    bicubic = nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False)
    fixed = LinearInterpreter(bicubic, scope.x[n : n + 1])
    show(axes[0][4], fixed.column((0, 6, 6))[0, 0, 5:21, 5:21], "column, bicubic")
    show(axes[1][4], fixed.row((0, 12, 12))[0, 0, 2:11, 2:11], "row, bicubic")
    return figure


def plot_singular_images(ours: Float[Tensor, "k h w"], theirs: Float[Tensor, "k h w"]) -> Any:
    """Singular images of a network by rank, its most local ones, and those of bicubic upscaling."""
    from locally.plots import canvas

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
    return figure


def plot_copies(scope: LinearInterpreter, whole: Float[Tensor, "n 1 h w"], gap: int, shift: int) -> Any:
    """Rows of a network that fills a gap from column 16 on with what stands `shift` pixels to its left."""
    from locally.plots import canvas

    figure, axes = canvas(7.2, 3.0, nrows=2, ncols=5)
    for line, n in zip(axes, (0, 4)):
        show(line[0], scope.x[n, 0], "input", signed=False)
        show(line[1], scope.output[n, 0], "output", signed=False)
        show(line[2], whole[n, 0], "what belongs there", signed=False)
        row = scope.row((0, 16, 18))[n, 0]
        row[:, 16 : 16 + gap] = 0
        show(line[3], row, "row in the gap")
        line[3].plot(18, 16, "x", color="black", markersize=4)
        line[3].plot(18 - shift, 16, "o", color="black", markersize=7, fillstyle="none")
        show(line[4], scope.row((0, 16, 8))[n, 0], "row elsewhere")
        line[4].plot(8, 16, "x", color="black", markersize=4)
    return figure
