"""Random changes of training images, a whole batch at once: each factory returns a function of batch and generator.

Random numbers are drawn on the generator's device, which makes a run repeat on any device that holds the images.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.errors import DataError

Augment = Callable[[Tensor, torch.Generator], Tensor]


def crop_and_flip(padding: int = 4, flip: bool = True) -> Augment:
    """Shift images (N, C, H, W) by up to ``padding`` pixels, mirrored at the borders; flip half of them sideways."""

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        count, channels, height, width = _image_shape(images)
        padded = F.pad(images, (padding,) * 4, mode="reflect")
        drawn = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=generator.device)
        top, left = drawn.to(images.device)
        rows = top + torch.arange(height, device=images.device)
        columns = left + torch.arange(width, device=images.device)
        if flip:
            mirrored = torch.rand(count, 1, generator=generator, device=generator.device) < 0.5
            columns = torch.where(mirrored.to(images.device), columns.flip(1), columns)
        # two gathers keep the memory layout; one advanced index would leave channels last
        cropped = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
        return cropped.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))

    return apply


def warp(degrees: float, scale: float, pixels: float) -> Augment:
    """Rotate, scale, shear and shift images (N, C, H, W) at random, uniformly within the limits on either side.

    ``scale`` limits the relative change of size and the slant, ``pixels`` the shift. What comes in from outside takes
    the lowest value of the image, the background of bright strokes on dark ground.
    """

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = _image_shape(images)
        drawn = 2 * torch.rand(5, count, generator=generator, device=generator.device) - 1
        angle, size, slant, right, down = drawn.to(images.device, images.dtype)
        angle, size, slant = angle * math.radians(degrees), 1 + scale * size, scale * slant
        # affine_grid measures in half widths and half heights
        across = torch.stack([size * angle.cos(), slant - angle.sin(), right * pixels * 2 / width], dim=1)
        along = torch.stack([angle.sin(), size * angle.cos(), down * pixels * 2 / height], dim=1)
        grid = F.affine_grid(torch.stack([across, along], dim=1), list(images.shape), align_corners=False)
        background = images.amin(dim=(1, 2, 3), keepdim=True)
        return F.grid_sample(images - background, grid, padding_mode="zeros", align_corners=False) + background

    return apply


def _image_shape(images: Tensor) -> tuple[int, int, int, int]:
    if images.dim() != 4:
        raise DataError(f"augmentation needs images (N, C, H, W), found shape {tuple(images.shape)}; switch it off")
    count, channels, height, width = images.shape
    return count, channels, height, width
