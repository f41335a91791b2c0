"""Saved activations counted, training and its exact resumption, and image sets from files."""

import copy
import gzip
import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from locally.training.auxiliary_networks import AugLocal
from locally.training.local_learning import (
    DGL,
    LinearHeads,
    LocalLearner,
    SavedTensors,
    Status,
    Trainer,
    cifar_resnet,
    epoch_cosine,
    measure_memory,
    residual_network,
    saved_peak,
    warm_cosine,
)
from locally.training.local_learning.images import (
    CIFAR_MEAN,
    CIFAR_STD,
    crop_and_flip,
    digit_pair_sums,
    digits,
    read_cifar10,
    read_mnist,
)
from locally.training.momentum_auxiliary import MomentumAuxiliary


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def few():
    data = digits()
    return replace(data, x=data.x[:256], y=data.y[:256], x_test=data.x_test[:64], y_test=data.y_test[:64])


def learner(rule=None, cuts=None, seed=0):
    net = residual_network([1, 1, 1], [4, 8, 8], in_channels=1, generator=seeded(seed))
    rule = DGL() if rule is None else rule
    return LocalLearner(net, rule, example=digits().x[:2], classes=10, cuts=cuts, generator=seeded(seed + 1))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_saved_tensors_are_counted_by_storage():
    a, w = torch.ones(100, 50), torch.ones(50, 20, requires_grad=True)
    with SavedTensors([w]) as saved:
        loss = (a @ w).relu().sum() + (a[:50] @ w).sum()  # a and its view are one storage; relu keeps its result
        assert saved.alive == 4 * (100 * 50 + 100 * 20)
        loss.backward()
    assert saved.alive == 0
    assert saved.peak == 4 * (100 * 50 + 100 * 20)
    assert saved_peak(lambda: (a @ w).sum().backward()) == 4 * (100 * 50)


@pytest.mark.parametrize(
    ("rule", "cuts", "megabytes"),
    [
        (LinearHeads(), 1, 2.489),
        (AugLocal(depth=1), None, 0.656),
        (AugLocal(depth=2), None, 0.574),
        (AugLocal(depth=3), None, 0.706),
        (AugLocal(depth=4), None, 0.902),
    ],
)
def test_resnet32_keeps_what_the_authors_code_keeps(rule, cuts, megabytes):
    x, y = torch.randn(4, 3, 32, 32, generator=seeded()), torch.tensor([0, 1, 2, 3])
    net = cifar_resnet(32, generator=seeded())
    report = measure_memory(LocalLearner(net, rule, example=x, classes=10, cuts=cuts), x, y)
    assert report.saved_peak / 4 / 1e6 == pytest.approx(megabytes, abs=0.0011)
    assert report.allocator_peak is None


def test_the_peak_is_that_of_the_largest_block():
    data = digits()
    local = learner(AugLocal(depth=1))
    x, y = data.x[:32].clone(), data.y[:32]
    report = measure_memory(local, data.x[:32], y)  # a slice counts as what it shows
    assert report.saved_peak == max(report.block_peaks)
    h = x
    for k, peak in enumerate(report.block_peaks):
        with SavedTensors([*local.parameters(), *local.buffers()]) as saved:
            h = local.run_block(k, h)
            local.run_backward(k, h, y, x)
            h = h.detach()
        assert saved.peak == peak
    assert report.saved_peak < measure_memory(learner(cuts=1), x, y).saved_peak
    assert report == measure_memory(local, x.clone(), y)


def test_measuring_leaves_the_learner_as_it_was():
    data = digits()
    for rule in (DGL(), MomentumAuxiliary(base=DGL(), momentum=0.5)):
        local = learner(rule)
        local.local_step(data.x[:8], data.y[:8])
        before = copy.deepcopy(local.state_dict()), [p.grad for p in local.parameters()]
        measure_memory(local, data.x[:8], data.y[:8])
        assert all(torch.equal(before[0][name], t) for name, t in local.state_dict().items())
        assert all(a is b for a, b in zip(before[1], (p.grad for p in local.parameters())))


# Training -------------------------------------------------------------------------------------------------------------


def trainer(**options):
    return Trainer(**{"epochs": 2, "batch_size": 64, **options})


def weights(local):
    return {**dict(local.named_parameters()), **dict(local.named_buffers())}


def same(a, b):
    return all(torch.equal(t, weights(b)[name]) for name, t in weights(a).items())


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.AdamW(p, 1e-2)])
def test_an_optimizer_a_block_is_one_for_all(optimizer):
    data, options = few(), {} if optimizer is None else {"optimizer": optimizer}
    joint, separate = learner(), learner()
    first = trainer(**options).fit(joint, data.x, data.y)
    second = trainer(per_block=True, **options).fit(separate, data.x, data.y)
    assert first.status is second.status is Status.FINISHED
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-6)
    for name, tensor in weights(joint).items():
        torch.testing.assert_close(tensor, weights(separate)[name])


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("rule", [DGL(), MomentumAuxiliary(base=DGL())])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path, rule, per_block):
    data, file = few(), tmp_path / "training.safetensors"
    shift = lambda x, rng: x + float(rng.normal()) / 100
    settings = trainer(epochs=3, augment=shift, per_block=per_block, optimizer=lambda p: torch.optim.AdamW(p, 1e-2))
    whole, broken, resumed = learner(rule), learner(rule), learner(rule, seed=9)
    wanted = settings.fit(whole, data.x, data.y, validation=(data.x_test, data.y_test))
    options = {"validation": (data.x_test, data.y_test), "checkpoint": file}
    stopped = settings.fit(broken, data.x, data.y, callback=lambda epoch, losses: epoch == 0, **options)
    assert stopped.status is Status.STOPPED
    found = settings.fit(resumed, data.x, data.y, **options)
    np.testing.assert_array_equal(found.losses, wanted.losses)
    np.testing.assert_array_equal(found.accuracies, wanted.accuracies)
    assert same(whole, resumed)


def test_checkpoints_of_something_else_are_refused(tmp_path):
    data, file = few(), tmp_path / "training.safetensors"
    settings = trainer(epochs=1)
    settings.fit(learner(), data.x, data.y, checkpoint=file)
    with pytest.raises(ValueError, match="made with seed = 0, not 1"):
        trainer(epochs=1, seed=1).fit(learner(), data.x, data.y, checkpoint=file)
    with pytest.raises(ValueError, match="cuts"):
        settings.fit(learner(cuts=2), data.x, data.y, checkpoint=file)
    with pytest.raises(ValueError, match="another network"):
        settings.fit(learner(LinearHeads()), data.x, data.y, checkpoint=file)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        settings.fit(learner(), data.x, data.y, checkpoint=file)


def test_divergence_ends_in_a_status():
    data = few()
    found = trainer(schedule=lambda *_: 1e30, epochs=5).fit(learner(), data.x, data.y)
    assert found.status is Status.DIVERGED
    assert len(found.losses) < 5


def test_training_learns_and_bfloat16_does_too():
    data = digits()
    for amp in (None, torch.bfloat16):
        local = learner(AugLocal(depth=1), cuts=3)
        history = trainer(amp=amp, epochs=4).fit(local, data.x, data.y)
        assert (history.losses[-1] < history.losses[0]).all()
        assert local.accuracy(data.x_test, data.y_test) > 0.5


def test_numbers_out_of_range_are_named(without_shape_checks):
    data = digits()
    for name, value in (("epochs", 0), ("batch_size", 0), ("seed", -1), ("amp", torch.float16)):
        with pytest.raises(ValueError, match=name):
            trainer(**{name: value})
    with pytest.raises(ValueError, match="batch_size must be at most"):
        trainer(batch_size=9999).fit(learner(), data.x, data.y)
    with pytest.raises(ValueError, match="one entry a sample"):
        trainer().fit(learner(), data.x, data.y[:-1])
    with pytest.raises(ValueError, match="peak"):
        warm_cosine(-1.0)


@given(steps=st.integers(1, 50), epochs=st.integers(1, 50), peak=st.floats(1e-3, 10))
def test_schedules_stay_between_zero_and_their_peak(steps, epochs, peak):
    for schedule in (warm_cosine(peak), epoch_cosine(peak, start=peak / 100)):
        rates = [schedule(step, steps, epochs) for step in range(steps * epochs)]
        assert min(rates) >= 0
        assert max(rates) <= peak * (1 + 1e-12)


def test_the_papers_schedule():
    schedule = epoch_cosine(0.8)
    assert schedule(0, 5, 400) == pytest.approx(0.01)
    fifth = 0.4 * (1 + np.cos(np.pi * 5 / 400))
    assert schedule(4 * 5 + 3, 5, 400) == pytest.approx(0.4 * fifth + 0.6 * 0.01)
    assert schedule(199 * 5, 5, 400) == pytest.approx(0.4)


# Images ---------------------------------------------------------------------------------------------------------------


def test_pairs_are_made_of_their_own_part_and_labelled_by_their_sum():
    single, pairs = digits(), digit_pair_sums(200, 100)
    lookup = {x.numpy().tobytes(): int(y) for x, y in zip(single.x, single.y)}
    for image, label in zip(pairs.x, pairs.y):
        left, right = (part.contiguous().numpy().tobytes() for part in image.split(8, dim=2))
        assert (lookup[left] + lookup[right]) % 10 == label
    test = {x.numpy().tobytes() for x in single.x_test}
    assert all(part.contiguous().numpy().tobytes() in test for image in pairs.x_test for part in image.split(8, dim=2))


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_mnist_is_read_from_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 6, 5)), rng.integers(0, 10, 30)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    divided = read_mnist(tmp_path, held_out=10)
    assert divided.x.shape == (20, 1, 6, 5)
    np.testing.assert_allclose(divided.x_test[:, 0].numpy(), images[20:] / 255, rtol=1e-6)
    assert divided.y_test.tolist() == labels[20:].tolist()
    write_idx(tmp_path / "train-images-idx3-ubyte", images[:7])
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels[:7])
    assert (len(read_mnist(tmp_path).y), len(read_mnist(tmp_path).y_test)) == (7, 30)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels[:6])
    with pytest.raises(ValueError, match="7 train images and 6 labels"):
        read_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"nothing of the kind, though long enough")
    with pytest.raises(ValueError, match="no IDX file"):
        read_mnist(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_mnist(tmp_path / "nowhere")


def write_cifar(path, count=4, size=8):
    rng = np.random.default_rng(0)
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for part in ("train", "test"):
            for label, name in enumerate(("bird", "cat")):
                for i in range(count):
                    pixels = np.full((size, size, 3), 200 * label + rng.integers(0, 40), np.uint8)
                    data = io.BytesIO()
                    Image.fromarray(pixels).save(data, "png")
                    file.writestr(f"{part}/{name}/{i:04}.png", data.getvalue())


def test_cifar_is_read_from_a_zip_and_from_binary_files(tmp_path):
    write_cifar(tmp_path / "cifar10.zip")
    data = read_cifar10(tmp_path / "cifar10.zip")
    assert data.x.shape == (8, 3, 8, 8)
    assert data.y.tolist() == [0] * 4 + [1] * 4
    pixels = data.x * torch.tensor(CIFAR_STD).view(3, 1, 1) + torch.tensor(CIFAR_MEAN).view(3, 1, 1)
    assert float(pixels.min()) > -1e-6
    assert float(pixels[4:].min()) > 0.7
    records = np.zeros((2, 3073), np.uint8)
    records[:, 0], records[1, 1:1025] = [3, 7], 255
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records.tofile(tmp_path / name)
    binary = read_cifar10(tmp_path)
    assert binary.y.tolist() == [3, 7] * 5
    assert float(binary.x[1, 0].min()) == pytest.approx((1 - CIFAR_MEAN[0]) / CIFAR_STD[0])
    records.ravel()[:-1].tofile(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="records of 3073"):
        read_cifar10(tmp_path)


def test_crops_are_shifted_and_flipped_copies():
    x = torch.rand(200, 1, 8, 8, generator=seeded())
    found = crop_and_flip(x, np.random.default_rng(0))
    padded = nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")
    flips = 0
    for image, frame in zip(found[:20], padded):
        windows = frame.unfold(1, 8, 1).unfold(2, 8, 1)[0].reshape(-1, 8, 8)
        plain = (windows == image).flatten(1).all(1).any()
        mirrored = (windows.flip(2) == image).flatten(1).all(1).any()
        assert plain or mirrored
        flips += int(mirrored and not plain)
    assert 0 < flips < 20


@pytest.mark.slow
@pytest.mark.skipif("LOCALLY_DATA" not in os.environ, reason="LOCALLY_DATA names no folder with mnist/")
def test_the_real_mnist_is_read():
    folder = Path(os.environ["LOCALLY_DATA"]) / "mnist"
    if not folder.exists():
        pytest.skip(f"{folder} does not exist")
    data = read_mnist(folder)
    assert data.x.shape[1:] == (1, 28, 28)
    assert data.y.unique().tolist() == list(range(10))
