"""Attributions by Captum: which part of the input an answer rests on."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.audits.explained import Explained, example_batches, patches_of, rows_of
from lightning_compress.audits.handles import rows_at_once
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.targets import get_submodule_clean, named_modules_clean

Method = Literal["integrated_gradients", "saliency", "occlusion", "grad_cam", "shapley"]
METHODS: tuple[Method, ...] = ("integrated_gradients", "saliency", "occlusion", "grad_cam", "shapley")
FORWARD_ONLY: tuple[Method, ...] = ("occlusion", "shapley")
INCOMPLETE = 0.05  # integrated gradients that miss more of the change of the output are no explanation of it


def captum() -> Any:
    """`captum.attr`, imported when it is first needed.

    Raises:
        CompressionError: It is not installed.
    """
    try:
        return importlib.import_module("captum.attr")
    except ImportError as error:
        raise CompressionError(
            f"explanations are computed by Captum, which cannot be imported ({error}); install it with "
            "pip install 'lightning-compress[audit]'"
        ) from error


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attributions of some examples.

    Attributes:
        maps: One value for each value of the input (N, ...), signed; of Grad-CAM one for each place (N, 1, ...).
        method: How they were made.
        delta: Of integrated gradients: what their sum misses of the change from baseline to input (N,).
        change: That change (N,).
    """

    maps: Tensor
    method: Method
    delta: Tensor | None = None
    change: Tensor | None = None

    @property
    def incompleteness(self) -> float:
        """Missing part of the change, over all examples: 0 is exact; more than 0.05 is refused."""
        if self.delta is None or self.change is None:
            return 0.0
        total = float(self.change.abs().sum())
        missing = float(self.delta.abs().sum())
        return missing / total if total > 0 else float(missing > 0)

    @property
    def places(self) -> Tensor:
        """Attribution of each place: channels of images and sequences are added (N, ...)."""
        return self.maps.sum(1) if self.maps.dim() > 2 else self.maps


def attribute(
    model: Explained,
    x: Tensor,
    choice: Tensor,
    others: tuple[Tensor, ...] = (),
    *,
    method: Method = "integrated_gradients",
    baseline: Tensor,
    steps: int = 24,
    patches: int = 16,
    permutations: int = 8,
    layer: str | None = None,
    seed: int = 0,
) -> Attribution:
    """Explain the same choice with the same baseline, steps and random numbers for any model.

    Examples are explained in batches that fit into memory, and no example's map depends on the others: permutations are
    drawn from the seed anew for every batch.

    Args:
        model: What is explained. Run it inside of `audit_context`: Captum leaves modes alone, and dropout would be on.
        x: The explained tensor (N, ...), raw; floats, or ids for methods that only run the model.
        choice: What is explained about each example, from `choose` of the dense model.
        others: Further tensors of the input.
        method: `"integrated_gradients"`, `"saliency"` (the signed gradient), `"occlusion"` (overlapping windows),
            `"grad_cam"` of a layer, `"shapley"` (sampled Shapley values of patches).
        baseline: What stands for "nothing there" (N, ...).
        steps: Of integrated gradients.
        patches: Features of Shapley values; of occlusion, windows a side squared.
        permutations: Of Shapley values.
        layer: Of Grad-CAM: its clean name.
        seed: Of the permutations.

    Raises:
        CompressionError: Captum is missing; there is no gradient, or none to ids; or the layer does not fit.

    Example:
        >>> from lightning_compress.audits.handles import ModelHandle
        >>> from lightning_compress.audits.tasks import Classification
        >>> model = Explained(ModelHandle(nn.Linear(3, 2)), Classification(), lambda x, others: x)
        >>> x = torch.ones(4, 3)
        >>> found = attribute(model, x, torch.zeros(4, dtype=torch.long), baseline=torch.zeros_like(x))
        >>> found.maps.shape, found.incompleteness < 1e-5
        (torch.Size([4, 3]), True)
    """
    if method not in METHODS:
        raise ValueError(f"expected a method of {METHODS}; got {method!r}")
    if method not in FORWARD_ONLY and not x.is_floating_point():
        raise CompressionError(
            f"{method} needs a gradient to the input and ids have none; use 'occlusion' or 'shapley'"
        )
    run = _RUNS[method]
    options = {"steps": steps, "patches": patches, "permutations": permutations, "layer": layer}
    calls = steps if method == "integrated_gradients" else 1
    maps, deltas, changes = [], [], []
    for some in example_batches(x, model.handle, calls):
        part = x[some].detach().clone().requires_grad_(method not in FORWARD_ONLY)
        start = baseline[some].detach()
        extra = (choice[some], *rows_of(others, some))
        with isolated_rng(seed), torch.enable_grad():
            maps.append(run(model, part, start, extra, options).detach().to(torch.float64))
        if method == "integrated_gradients":
            with torch.no_grad():
                changes.append((model(part.detach(), *extra) - model(start, *extra)).double())
            deltas.append(maps[-1].flatten(1).sum(1) - changes[-1])
    if deltas:
        return Attribution(torch.cat(maps), method, torch.cat(deltas), torch.cat(changes))
    return Attribution(torch.cat(maps), method)


def _integrated(model: Explained, x: Tensor, start: Tensor, extra: Any, options: dict[str, Any]) -> Any:
    return captum().IntegratedGradients(model, multiply_by_inputs=True).attribute(
        x, baselines=start, additional_forward_args=extra, n_steps=options["steps"],
        internal_batch_size=max(len(x), rows_at_once(x, model.handle.batch_size)),
    )  # fmt: skip


def _saliency(model: Explained, x: Tensor, start: Tensor, extra: Any, options: dict[str, Any]) -> Any:
    return captum().Saliency(model).attribute(x, abs=False, additional_forward_args=extra)


@torch.no_grad()
def _occlusion(model: Explained, x: Tensor, start: Tensor, extra: Any, options: dict[str, Any]) -> Any:
    if x.dim() == 2:
        features = patches_of(tuple(x.shape[1:]), max(64, options["patches"])).to(x.device)
        return captum().FeatureAblation(model).attribute(
            x, baselines=start, additional_forward_args=extra, feature_mask=features
        )  # fmt: skip
    side = max(2, round(float(options["patches"]) ** 0.5)) if x.dim() > 3 else max(2, options["patches"])
    window = [max(1, -(-size // side)) for size in x.shape[2:]]
    strides = [max(1, width // 2) for width in window]
    return captum().Occlusion(model).attribute(
        x, sliding_window_shapes=(x.shape[1], *window), strides=(x.shape[1], *strides), baselines=start,
        additional_forward_args=extra,
    )  # fmt: skip


@torch.no_grad()
def _shapley(model: Explained, x: Tensor, start: Tensor, extra: Any, options: dict[str, Any]) -> Any:
    features = patches_of(tuple(x.shape[1:]), options["patches"]).to(x.device)
    return captum().ShapleyValueSampling(model).attribute(
        x, baselines=start, additional_forward_args=extra, feature_mask=features, n_samples=options["permutations"]
    )  # fmt: skip


def _grad_cam(model: Explained, x: Tensor, start: Tensor, extra: Any, options: dict[str, Any]) -> Any:
    root, name = model.handle.gradient_model, options["layer"]
    if name is None or not isinstance(root, nn.Module):
        raise CompressionError(
            "Grad-CAM needs `layer=`, the name of a layer of a module; the last convolution is usual"
        )
    found = captum().LayerGradCam(model, get_submodule_clean(root, name)).attribute(
        x, additional_forward_args=extra, relu_attributions=False
    )  # fmt: skip
    found = found[0] if isinstance(found, tuple) else found
    if found.dim() != x.dim() or found.dim() < 3:
        raise CompressionError(
            f"layer {name!r} gives {tuple(found.shape)}, which has no places to show; name another one"
        )
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[found.dim()]
    return F.interpolate(found.detach(), x.shape[2:], mode=mode, align_corners=False)


_RUNS = {
    "integrated_gradients": _integrated,
    "saliency": _saliency,
    "occlusion": _occlusion,
    "grad_cam": _grad_cam,
    "shapley": _shapley,
}


def last_convolution(model: Any) -> str | None:
    """Clean name of the last convolution of a module; None if it has none."""
    if not isinstance(model, nn.Module):
        return None
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [name for name, module in named_modules_clean(model) if isinstance(module, kinds)]
    return names[-1] if names else None


def has_layer(model: Any, name: str) -> bool:
    """Whether a module has a submodule of that clean name."""
    return isinstance(model, nn.Module) and name in dict(named_modules_clean(model))
