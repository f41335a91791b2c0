"""The numbers for what one sees: closed forms for waves, pixels and displaced weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locally.tangent.interpreter import band, gaze, support, template_share


def wave(n, fy, fx):
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return torch.cos(2 * math.pi * (fy * y + fx * x) / n).double()


def test_support_of_a_constant_a_pixel_and_a_wave():
    assert support(torch.full((4, 6), -2.0)) == pytest.approx(1)
    pixel = torch.zeros(4, 6)
    pixel[1, 2] = 3
    assert support(pixel) == pytest.approx(1 / 24)
    assert support(wave(16, 0, 3)) == pytest.approx((1 / 2) ** 2 / (3 / 8))


@given(st.integers(0, 10**6), st.floats(1e-20, 1e20))
def test_support_does_not_depend_on_scale_and_lies_between_a_pixel_and_all(seed, scale):
    image = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert support(scale * image) == pytest.approx(float(support(image)))
    assert 1 / 15 - 1e-12 <= support(image) <= 1 + 1e-12


@pytest.mark.parametrize(
    ("fy", "fx", "angle"), [(0, 4, 0), (4, 0, math.pi / 2), (4, 4, math.pi / 4), (-4, 4, 3 * math.pi / 4)]
)
def test_band_of_plane_waves(fy, fx, angle):
    found = band(wave(16, fy, fx))
    assert found.frequency == pytest.approx(math.hypot(fy, fx) / 16)
    assert found.bandwidth == pytest.approx(0, abs=1e-6)
    assert found.orientation == pytest.approx(angle)
    assert found.coherence == pytest.approx(1)
    assert found.constant_share == pytest.approx(0, abs=1e-12)


def test_band_without_direction():
    found = band(torch.stack([wave(16, 3, 0) + wave(16, 0, 3), torch.ones(16, 16).double()]))
    assert found.coherence.tolist() == pytest.approx([0, 0], abs=1e-9)
    assert found.constant_share.tolist() == pytest.approx([0, 1], abs=1e-12)


def test_gaze_of_weights_that_stand_elsewhere():
    row = torch.zeros(2, 9, 9, dtype=torch.float64)
    row[0, 1, 4], row[1, 4, 3], row[1, 4, 5] = -2.0, 1.0, -1.0
    found = gaze(row, torch.tensor([[5.0, 7.0], [4.0, 4.0]]).double())
    assert found.centre.tolist() == [[1, 4], [4, 4]]
    assert found.copy_distance.tolist() == pytest.approx([5, 0])
    assert found.mean_distance.tolist() == pytest.approx([5, 1])
    assert found.spread.tolist() == pytest.approx([0, 1])


def test_gaze_names_places_of_the_wrong_shape(without_shape_checks):
    with pytest.raises(ValueError, match="places"):
        gaze(torch.ones(2, 3, 3), torch.ones(3, 2))


def test_template_share_runs_from_zero_to_one():
    share = template_share(torch.tensor([0.0, 0.0, 2.0, -1.0]), torch.tensor([0.0, 5.0, 0.0, 1.0]))
    assert share.tolist() == [0, 0, 1, 0.5]
