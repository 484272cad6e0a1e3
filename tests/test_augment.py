"""Augmentation against slow references: every crop is a window of its mirrored image, no warp invents values."""

import pytest
import torch
import torch.nn.functional as F

from espalier.bench.augment import Augment, crop_and_flip, warp
from espalier.errors import DataError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_mirrored_image(flip: bool) -> None:
    images = torch.randn(64, 2, 7, 6)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    seen = set()
    for number, cropped in enumerate(crop_and_flip(2, flip)(images, seeded())):
        windows = {
            (top, left, mirrored): padded[number, :, top : top + 7, left : left + 6].flip(2 if mirrored else ())
            for top in range(5)
            for left in range(5)
            for mirrored in ({False, True} if flip else {False})
        }
        found = [place for place, window in windows.items() if torch.equal(window, cropped)]
        assert len(found) == 1
        seen.add(found[0])
    assert {top for top, _, _ in seen} == set(range(5))
    assert {left for _, left, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def test_a_warp_without_limits_changes_nothing() -> None:
    images = torch.rand(5, 1, 8, 8)
    assert torch.allclose(warp(0, 0, 0)(images, seeded()), images, atol=1e-5)


def test_a_warp_by_whole_pixels_shifts() -> None:
    images = torch.zeros(200, 1, 9, 9)
    images[:, :, 4, 4] = 1
    moved = warp(0, 0, 2)(images, seeded())
    # bilinear: the bright pixel spreads over its neighbours, its weight stays and its centre moves by at most 2
    assert torch.allclose(moved.sum(dim=(1, 2, 3)), torch.ones(200), atol=1e-5)
    rows = (moved.sum(dim=(1, 3)) * torch.arange(9)).sum(dim=1) - 4
    assert rows.abs().max() <= 2 + 1e-5
    assert rows.abs().max() > 1.8


def test_a_warp_stays_within_the_range_of_each_image_and_keeps_flat_ones() -> None:
    images = torch.randn(50, 3, 8, 8)
    changed = warp(30, 0.3, 2)(images, seeded())
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    assert bool(((changed >= low - 1e-5) & (changed <= high + 1e-5)).all())
    assert not torch.allclose(changed, images, atol=0.1)
    flat = torch.full((3, 1, 8, 8), -1.25)
    assert torch.allclose(warp(30, 0.3, 2)(flat, seeded()), flat)


@pytest.mark.parametrize("augment", [crop_and_flip(), warp(10, 0.1, 1)])
def test_the_generator_decides_alone(augment: Augment) -> None:
    images = torch.randn(8, 3, 32, 32)
    before = torch.get_rng_state()
    assert torch.equal(augment(images, seeded()), augment(images, seeded()))
    assert not torch.equal(augment(images, seeded()), augment(images, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", [crop_and_flip(), warp(10, 0.1, 1)])
def test_vectors_are_refused(augment: Augment) -> None:
    with pytest.raises(DataError, match=r"needs images \(N, C, H, W\), found shape \(4, 2\)"):
        augment(torch.zeros(4, 2), seeded())
