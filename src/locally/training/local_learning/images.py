"""Image sets from files that the user has, the papers' augmentation, and two tasks made of scikit-learn's digits."""

import gzip
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from numpy import ndarray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from locally.checks import check_count


@dataclass(frozen=True)
class ImageSet:
    """Pixels, normalised by `mean` and `std` of the channels where these are not 0 and 1."""

    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]
    x_test: Float[Tensor, "m c h w"]
    y_test: Int[Tensor, " m"]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def to(self, device: str) -> "ImageSet":
        x, y, x_test, y_test = (t.to(device) for t in (self.x, self.y, self.x_test, self.y_test))
        return ImageSet(x, y, x_test, y_test, self.mean, self.std)


def digits(*, size: int = 8, random_state: int = 0) -> ImageSet:
    """The 1797 handwritten digits of scikit-learn in [0, 1], a quarter of each class for testing.

    `size` 8 as they are, else enlarged bilinearly.

    >>> digits().x.shape, digits(size=16).x_test.shape
    (torch.Size([1347, 1, 8, 8]), torch.Size([450, 1, 16, 16]))
    """
    from sklearn.model_selection import train_test_split

    check_count("size", size, at_least=8)
    pixels, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        pixels / 16, labels, test_size=0.25, stratify=labels, random_state=random_state
    )
    images = [torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in (x, x_test)]
    if size != 8:
        images = [F.interpolate(part, (size, size), mode="bilinear", align_corners=False) for part in images]
    return ImageSet(images[0], torch.tensor(y), images[1], torch.tensor(y_test))


def digit_pair_sums(train: int = 4000, test: int = 1500, *, random_state: int = 0) -> ImageSet:
    """Two digits side by side, labelled with the last figure of their sum; test pairs are of test digits only.

    No single part of the image tells anything about the label, so features that a short-sighted loss rewards are of no
    use.

    >>> pairs = digit_pair_sums(100, 50)
    >>> pairs.x.shape, len(pairs.y_test)
    (torch.Size([100, 1, 8, 16]), 50)
    """
    check_count("train", train)
    check_count("test", test)
    single = digits(random_state=random_state)
    rng = np.random.default_rng(random_state)
    drawn = []
    for x, y, count in ((single.x, single.y, train), (single.x_test, single.y_test, test)):
        left, right = torch.from_numpy(rng.integers(len(x), size=(2, count)))
        drawn.append((torch.cat([x[left], x[right]], dim=3), (y[left] + y[right]) % 10))
    return ImageSet(*drawn[0], *drawn[1])


def read_mnist(folder: Path, *, held_out: int = 2000) -> ImageSet:
    """MNIST from the IDX files of `folder`, gzipped or not.

    Where the training part is missing, the test part is divided: its last `held_out` images are for testing.

    Raises:
        FileNotFoundError: the test part is not there either.
        ValueError: a file is no IDX file of that kind, or images and labels differ in number.
    """
    x_test, y_test = _read_idx_pair(folder, "t10k")
    if _idx_file(folder, "train-images-idx3-ubyte").exists():
        x, y = _read_idx_pair(folder, "train")
    else:
        check_count("held_out", held_out)
        if held_out >= len(y_test):
            raise ValueError(f"held_out must be below the {len(y_test)} images of {folder}, got {held_out}")
        x, y, x_test, y_test = x_test[:-held_out], y_test[:-held_out], x_test[-held_out:], y_test[-held_out:]
    images = [torch.from_numpy(part).float().unsqueeze(1) / 255 for part in (x, x_test)]
    return ImageSet(images[0], torch.from_numpy(y).long(), images[1], torch.from_numpy(y_test).long())


def _read_idx_pair(folder: Path, part: str) -> tuple[UInt8[ndarray, "n h w"], UInt8[ndarray, " n"]]:
    images = _read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    labels = _read_idx(_idx_file(folder, f"{part}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {part} images and {len(labels)} labels")
    return images, labels


def _idx_file(folder: Path, name: str) -> Path:
    plain = Path(folder) / name
    return plain if plain.exists() else plain.with_name(name + ".gz")


def _read_idx(path: Path, dimensions: int) -> UInt8[ndarray, "..."]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path} is no IDX file of bytes in {dimensions} dimensions")
    shape = tuple(np.frombuffer(data, ">i4", dimensions, 4).tolist())
    if len(data) - header != np.prod(shape):
        raise ValueError(f"{path} should hold {shape} bytes, but has {len(data) - header}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


def read_cifar10(path: Path) -> ImageSet:
    """CIFAR-10, normalised, from a zip file of train/<class>/*.jpg and test/<class>/*.jpg (or .png), classes by name.

    Or from a folder of the original binary files, data_batch_1.bin to data_batch_5.bin and test_batch.bin.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there are no images, or a binary file is no multiple of 3073 bytes.
    """
    path = Path(path)
    read = _read_binary if path.is_dir() else _read_zip
    parts = []
    for part in ("train", "test"):
        pixels, labels = read(path, part)
        x = torch.from_numpy(pixels).float().div_(255)
        for channel, (mean, std) in enumerate(zip(CIFAR_MEAN, CIFAR_STD)):
            x[:, channel].sub_(mean).div_(std)
        parts.append((x, torch.from_numpy(labels).long()))
    return ImageSet(*parts[0], *parts[1], CIFAR_MEAN, CIFAR_STD)


def _read_zip(path: Path, part: str) -> tuple[UInt8[ndarray, "n 3 h w"], Int[ndarray, " n"]]:
    from PIL import Image

    images, labels = [], []
    with zipfile.ZipFile(path) as file:
        names = sorted(n for n in file.namelist() if n.startswith(f"{part}/") and n.endswith((".jpg", ".png")))
        if not names:
            raise ValueError(f"{path} holds no images under {part}/")
        classes = sorted({name.split("/")[1] for name in names})
        for name in names:
            images.append(np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")))
            labels.append(classes.index(name.split("/")[1]))
    return np.stack(images).transpose(0, 3, 1, 2), np.array(labels)


def _read_binary(path: Path, part: str) -> tuple[UInt8[ndarray, "n 3 32 32"], Int[ndarray, " n"]]:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if part == "train" else ["test_batch.bin"]
    records = []
    for name in names:
        data = np.fromfile(path / name, np.uint8)
        if not data.size or data.size % 3073:
            raise ValueError(f"{path / name} should hold records of 3073 bytes, but has {data.size} bytes")
        records.append(data.reshape(-1, 3073))
    table = np.concatenate(records)
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].astype(np.int64)


def crop_and_flip(x: Shaped[Tensor, "b c h w"], rng: np.random.Generator) -> Shaped[Tensor, "b c h w"]:
    """Shift each image by up to 4 pixels, what comes in being mirrored, and turn half of them left to right."""
    b, _, h, w = x.shape
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    tops, lefts = (torch.from_numpy(rng.integers(0, 9, b)).to(x.device) for _ in range(2))
    flipped = torch.from_numpy(rng.random(b) < 0.5).to(x.device)
    rows = tops[:, None] + torch.arange(h, device=x.device)
    columns = torch.arange(w, device=x.device).expand(b, w)
    columns = lefts[:, None] + torch.where(flipped[:, None], columns.flip(1), columns)
    each = torch.arange(b, device=x.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
