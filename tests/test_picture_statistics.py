"""The statistics that the sentinel watches, on pictures small enough to count by hand. Those that are older are tested
as rewards, in tests/test_rewards.py."""

from __future__ import annotations

import math

import pytest
import torch

from raftdiff.picture_statistics import STATISTICS, edge_density, grid_energy


def gray(rows: torch.Tensor) -> torch.Tensor:
    return rows.round().to(torch.uint8).expand(3, *rows.shape)


def wave(period: int, size: int = 32) -> torch.Tensor:
    """Vertical stripes, one wave in `period` pixels."""
    return (128 + 100 * torch.cos(2 * math.pi * torch.arange(size) / period)).expand(size, size)


def test_a_step_is_an_edge_in_the_two_columns_beside_it():
    rows = torch.zeros(5, 8)
    rows[:, 4:] = 40  # Sobel over 4 gives 40 in both columns
    # of 3 x 6 inner pixels, columns 3 and 4 of each row
    assert edge_density(gray(rows)) == pytest.approx(2 / 6)
    assert edge_density(gray(rows * 0.75)) == 0  # 30 is below the limit of 32
    assert edge_density(gray(rows.T.contiguous())) == pytest.approx(2 / 6)


def test_a_slope_is_no_edge():
    assert edge_density(gray(torch.arange(0, 160, 10.0).expand(8, 16))) == 0


def test_a_grid_has_all_of_its_fine_energy_in_one_frequency_and_noise_has_not():
    assert grid_energy(gray(wave(4))) > 0.999
    assert grid_energy(gray(wave(2))) > 0.999  # the finest there is, which is its own mirror image
    noise = torch.randint(0, 256, (32, 32), generator=torch.Generator().manual_seed(0)).float()
    assert grid_energy(gray(noise)) < 0.05
    assert grid_energy(gray((wave(4) + noise) / 2)) > 5 * grid_energy(gray(noise))


def test_coarse_stripes_and_plain_pictures_are_no_grid():
    assert grid_energy(gray(torch.full((16, 16), 77.0))) == 0
    coarse = wave(16) + torch.randint(-9, 10, (32, 32), generator=torch.Generator().manual_seed(0))
    assert grid_energy(gray(coarse)) < 0.1


@pytest.mark.parametrize("height, width", [(3, 3), (5, 4), (64, 48)])
def test_every_statistic_is_a_finite_number_at_any_size(height, width):
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for of in STATISTICS.values():
        for picture in (image, torch.zeros_like(image), torch.full_like(image, 255)):
            assert math.isfinite(of(picture))
