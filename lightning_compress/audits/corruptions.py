"""Common corruptions, made on the spot: noise, blur, light and resolution in five severities.

Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations",
https://arxiv.org/abs/1903.12261. Severities are those of CIFAR-10-C for small images and of ImageNet-C for large ones;
the filters are our own, so numbers are not those of the published files. Left out are what needs files or a codec:
frost, snow, spatter, JPEG. Random numbers belong to an example, so that a batch changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.audits.attacks import noise
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError

SEVERITIES = (1, 2, 3, 4, 5)
_LARGE = 64  # the shorter side from which the severities of ImageNet-C hold
_SMALL_AND_LARGE: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": ((0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "defocus_blur": ((0.6, 0.8, 1.0, 1.2, 1.5), (3, 4, 6, 8, 10)),
    "motion_blur": ((1.0, 1.5, 2.0, 2.5, 3.0), (3, 5, 8, 12, 15)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
}
_OTHERS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.02, 0.04, 0.06, 0.08, 0.10),
    "impulse_noise": (0.02, 0.04, 0.06, 0.08, 0.10),
    "missing": (0.05, 0.1, 0.15, 0.2, 0.3),
    "drift": (0.05, 0.1, 0.15, 0.2, 0.3),
}


def names(x: Tensor) -> tuple[str, ...]:
    """The corruptions that mean something for such inputs.

    Example:
        >>> names(torch.zeros(1, 3))
        ('gaussian_noise', 'impulse_noise', 'missing', 'drift')
    """
    return tuple(_SMALL_AND_LARGE if x.dim() == 4 else _OTHERS)


def corrupt(x: Tensor, name: str, severity: int, *, space: InputSpace, seeds: Tensor) -> Tensor:
    """Corrupt raw inputs.

    Args:
        x: Raw inputs inside the bounds: images (N, C, H, W), or anything else (N, ...), such as tables, for which
            ``"missing"`` puts values to the middle of their range and ``"drift"`` shifts each column alike.
        name: One of `names(x)`.
        severity: 1 (mild) to 5.
        space: Bounds of inputs; entries that may not change stay.
        seeds: int64 (N,), one for each example.

    Returns:
        Inputs of the same shape, inside the bounds.

    Raises:
        CompressionError: For an unknown corruption or severity, unbounded inputs, or inputs outside the bounds.

    Example:
        >>> images = torch.full((2, 1, 8, 8), 0.5)
        >>> found = corrupt(images, "contrast", 5, space=InputSpace(0.0, 1.0), seeds=torch.arange(2))
        >>> bool((found == 0.5).all())
        True
    """
    if name not in names(x):
        raise CompressionError(f"{name!r} is none of {', '.join(names(x))}, which are what such inputs can have.")
    if severity not in SEVERITIES:
        raise CompressionError(f"severity={severity} is not a whole number from 1 to 5.")
    if seeds.shape != (len(x),):
        raise CompressionError(f"{len(x)} inputs need as many seeds, not {tuple(seeds.shape)}.")
    space.check(x)
    low, high = space.bounds(x)
    if not bool(torch.isfinite(high - low).all()):
        raise CompressionError("Corruptions are shares of the range of inputs; declare bounds that are finite.")
    inside = ((space.clip(x) - low) / (high - low)).clamp(0, 1)
    own = noise.derive(seeds.to(x.device), "corruption", name, severity)
    if x.dim() == 4:
        level = _SMALL_AND_LARGE[name][min(x.shape[2:]) >= _LARGE][severity - 1]
        changed = _IMAGES[name](inside, level, own)
    else:
        changed = _TABLES[name](inside, _OTHERS[name][severity - 1], own)
    return space.keep(space.clip(low + changed.clamp(0, 1) * (high - low)), x)


def _gaussian_noise(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    return u + level * noise.normal(seeds, u.shape[1:], u.dtype)


def _speckle_noise(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    return u + u * level * noise.normal(seeds, u.shape[1:], u.dtype)


def _shot_noise(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    """Poisson counts of `level` photons at full light; torch draws them, with a generator for each example."""
    counts = []
    for image, seed in zip(u.cpu(), seeds.tolist(), strict=True):
        generator = torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        counts.append(torch.poisson(image * level, generator=generator))
    return torch.stack(counts).to(u) / level


def _impulse_noise(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    """Salt and pepper."""
    drawn = noise.uniform(seeds, u.shape[1:], dtype=u.dtype)
    return torch.where(drawn < level / 2, 0.0, torch.where(drawn < level, 1.0, u))


def _gaussian_blur(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    reach = max(1, math.ceil(4 * level))
    at = torch.arange(-reach, reach + 1, dtype=u.dtype, device=u.device)
    line = torch.exp(-0.5 * (at / level) ** 2)
    line = line / line.sum()
    return _filtered(_filtered(u, line[None, :]), line[:, None])


def _defocus_blur(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    """A disk; its rim is as strong as the share of the pixel that it covers."""
    reach = max(1, math.ceil(level))
    fine = 8
    at = (torch.arange((2 * reach + 1) * fine, dtype=torch.float64) + 0.5) / fine - (reach + 0.5)
    disk = (at[:, None] ** 2 + at[None] ** 2 <= level**2).double()
    disk = disk.view(2 * reach + 1, fine, 2 * reach + 1, fine).mean((1, 3))
    return _filtered(u, (disk / disk.sum()).to(u))


def _motion_blur(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    """Along a line at an angle of up to 45 degrees that is the example's own, fading like a bell."""
    reach = max(1, math.ceil(2 * level))
    angle = noise.uniform(seeds, (), -math.pi / 4, math.pi / 4, torch.float64)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64, device=u.device)
    along = at[None, None, :] * angle.cos()[:, None, None] + at[None, :, None] * angle.sin()[:, None, None]
    across = at[None, :, None] * angle.cos()[:, None, None] - at[None, None, :] * angle.sin()[:, None, None]
    kernel = torch.exp(-0.5 * (along / level) ** 2) * (1 - across.abs()).clamp_min(0)
    kernel = (kernel / kernel.sum((1, 2), keepdim=True)).to(u.dtype)
    return torch.cat([_filtered(image[None], own) for image, own in zip(u, kernel, strict=True)])


def _brightness(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    """Colours grow until the brightest is lighter by `level`, as in HSV; where there is none, grey is added."""
    top = u.amax(1, keepdim=True)
    scaled = u * ((top + level).clamp(max=1.0) / top.clamp_min(1e-6))
    return torch.where(top > 1e-6, scaled, u + level)


def _contrast(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    mean = u.mean((2, 3), keepdim=True)
    return (u - mean) * level + mean


def _pixelate(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    size = [max(1, int(side * level)) for side in u.shape[2:]]
    return F.interpolate(F.interpolate(u, size, mode="area"), u.shape[2:], mode="nearest")


def _missing(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    return torch.where(noise.uniform(seeds, u.shape[1:], dtype=u.dtype) < level, 0.5, u)


def _drift(u: Tensor, level: float, seeds: Tensor) -> Tensor:
    """Every example is shifted in the same direction: a sensor that ages."""
    same = noise.signs(torch.zeros_like(seeds[:1]), u.shape[1:], u.dtype)
    return u + level * same


def _filtered(u: Tensor, kernel: Tensor) -> Tensor:
    """Each channel filtered, with the border repeated."""
    height, width = kernel.shape
    padded = F.pad(u, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    weight = kernel[None, None].expand(u.shape[1], 1, height, width)
    return F.conv2d(padded, weight, groups=u.shape[1])


_IMAGES: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
}
_TABLES: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "impulse_noise": _impulse_noise,
    "missing": _missing,
    "drift": _drift,
}
