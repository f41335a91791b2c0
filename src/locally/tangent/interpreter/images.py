"""Images for networks to be looked at on: the user's folders, and scikit-learn's two photographs."""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_count

IMAGES = (".jpg", ".jpeg", ".png")


def image_files(folder: Path | str) -> list[Path]:
    """JPEG and PNG files directly in a folder, by name.

    Raises:
        ValueError: there are none.
    """
    files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"{folder} holds no JPEG or PNG files")
    return files


def labelled_images(folder: Path | str) -> tuple[list[tuple[Path, int]], list[str]]:
    """Images in a folder for each class, with the class as an index into the folders' names in order.

    Raises:
        ValueError: there are no folders, or one of them holds no images.
    """
    classes = sorted(f.name for f in Path(folder).iterdir() if f.is_dir())
    if not classes:
        raise ValueError(f"{folder} holds no folders, one for each class")
    return [(f, k) for k, name in enumerate(classes) for f in image_files(Path(folder) / name)], classes


def read_image(path: Path | str, size: int, *, short: int | None = None) -> Float[Tensor, "1 3 size size"]:
    """The middle size x size pixels in [0, 1], after scaling the shorter side to `short` where that is given.

    Raises:
        ValueError: the file is no image, or is smaller than that.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    check_count("size", size)
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
        if short is not None:
            scale = short / min(image.size)
            width, height = (max(size, round(s * scale)) for s in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1).float() / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no image: {error}") from error
    if min(pixels.shape[1:]) < size:
        raise ValueError(f"{path} must be at least {size} x {size} pixels, got {tuple(pixels.shape[1:])}")
    top, left = ((s - size) // 2 for s in pixels.shape[1:])
    return pixels[None, :, top : top + size, left : left + size]


class Patches:
    """Random grey squares of photographs, `size` pixels wide, without the last `held_out` rows."""

    def __init__(self, photographs: list[Tensor], size: int, held_out: int, seed: int) -> None:
        self.photographs, self.size, self.held_out = photographs, size, held_out
        self.generator = torch.Generator().manual_seed(seed)

    def corner(self, rows: int, columns: int) -> tuple[int, int]:
        pick = lambda n: int(torch.randint(n, (1,), generator=self.generator))
        return pick(rows), pick(columns)

    def draw(self, count: int) -> Float[Tensor, "count 1 size size"]:
        patches = []
        for i in range(count):
            image = self.photographs[i % len(self.photographs)]
            top, left = self.corner(image.shape[1] - self.held_out - self.size, image.shape[2] - self.size)
            patches.append(image[:, top : top + self.size, left : left + self.size])
        return torch.stack(patches)


def load_photographs() -> list[Float[Tensor, "1 h w"]]:
    """The two that come with scikit-learn, grey, in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [torch.as_tensor(i / 255, dtype=torch.float32).mean(2)[None] for i in load_sample_images().images]


def halved(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c _ _"]:
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean()))


def grey(images: Float[Tensor, "k 3 h w"]) -> Float[Tensor, "k h w"]:
    """The channel with the most energy."""
    channel = images.square().sum((2, 3)).argmax(1)
    return images[torch.arange(len(images)), channel]


def drawn(count: int, seed: int, most: int = 10) -> list[int]:
    """So many indices, or all where there are fewer."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].tolist()
