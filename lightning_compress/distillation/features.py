"""Distillation of features: what terms over pairs of layers share, projectors that follow cuts, and FitNets' hints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.distillation.losses import exact, mean_of
from lightning_compress.distillation.pairing import LayerPairs
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.nested import tensors_in
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import LossTerm, Records, Shapes, TapSpec, TapSpecs

if TYPE_CHECKING:
    from lightning_compress.surgery import Edit, Swap

Layers = str | Sequence[str] | Mapping[str, str]
"""``"auto"``, one name, several names, or a mapping from names of the student's layers to the teacher's."""


@runtime_checkable
class Traced(Protocol):
    """Shapes that know which channels of a feature an edit kept."""

    def kept(self, spec: TapSpec, channel_dim: int, swaps: Sequence[Swap]) -> Tensor:
        """Return the kept indices of the feature's old channels."""


def channel_dim_of(shape: Sequence[int], channel_dim: int | None) -> int:
    """Where the channels of a feature are: as said, else last for ``(B, tokens, D)``, else 1.

    Example:
        >>> channel_dim_of((8, 16, 4, 4), None), channel_dim_of((8, 10, 32), None), channel_dim_of((8, 10, 32), 1)
        (1, 2, 1)
    """
    if channel_dim is not None:
        return channel_dim % len(shape)
    return 2 if len(shape) == 3 else 1


def fit_maps(
    student: Tensor, teacher: Tensor, channel_dim: int | None = None, tokens: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Return both features with channels at 1 and the same spatial size: the larger is averaged down.

    Args:
        student: Features ``(B, C, ...)``, or as `channel_dim` says.
        teacher: Features of as many dimensions, of the same batch.
        channel_dim: Where the channels are, see `channel_dim_of`.
        tokens: Whether the places are tokens, which are not averaged; default: three dimensions and no `channel_dim`.

    Raises:
        CompressionError: If batches or numbers of dimensions differ, or tokens that cannot be averaged.

    Example:
        >>> s, t = fit_maps(torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 8, 8))
        >>> s.shape, t.shape
        (torch.Size([2, 8, 4, 4]), torch.Size([2, 16, 4, 4]))
    """
    found = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.dim() != teacher.dim() or student.dim() < 2 or student.shape[0] != teacher.shape[0]:
        raise CompressionError(f"These features cannot be compared: {found}. Pair layers of the same kind.")
    s, t = (x.movedim(channel_dim_of(x.shape, channel_dim), 1) for x in (student, teacher))
    if s.shape[2:] == t.shape[2:]:
        return s, t
    if s.dim() == 3 and (channel_dim is None if tokens is None else tokens):
        raise CompressionError(
            f"Student and teacher have different numbers of tokens: {found}. Give both the same input, or write "
            "channel_dim=1 if these are signals (B, channels, length)."
        )
    size = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[s.dim() - 3]
    return (s if list(s.shape[2:]) == size else pool(s, size)), (t if list(t.shape[2:]) == size else pool(t, size))


# -- projectors --------------------------------------------------------------------------------------------------------


class Projector(nn.Linear):
    """A linear map over channels at dimension 1, the same at each place: a 1x1 convolution of any dimension.

    Example:
        >>> Projector(3, 5)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, ...) to (B, C', ...)."""
        if not torch.is_autocast_enabled(input.device.type):
            input = input.to(self.weight.dtype)
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Projectors(nn.Module):
    """The projectors of a term, one for each pair of layers that needs one; one module, so that it can be sharded.

    Args:
        widths: Channels of student and teacher, by the number of the pair.
        build: Makes the module for one pair.

    Example:
        >>> Projectors({1: (3, 5)})([torch.zeros(2, 3), torch.zeros(2, 3)])[1].shape
        torch.Size([2, 5])
    """

    def __init__(self, widths: Mapping[int, tuple[int, int]], build: Any = Projector) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): build(*pair) for i, pair in widths.items()})

    def forward(self, features: Sequence[Tensor]) -> list[Any]:
        """Project the features that have a projector."""
        return [self.layers[str(i)](x) if str(i) in self.layers else x for i, x in enumerate(features)]


# -- terms over pairs of layers ----------------------------------------------------------------------------------------


class FeatureTerm(LossTerm):
    """A term over pairs of layers, call by call; say how two features are compared in `loss`.

    Args:
        layers: ``"auto"`` (see `pair_layers`), a name, several names, or a mapping from the student's names to the
            teacher's. Names are clean names of modules below the student.
        weight: >= 0; its factor in the total.
        name: Its name in logs.
        channel_dim: Where the channels are; default: last for ``(B, tokens, D)``, else 1. Give 1 for signals
            ``(B, channels, length)``.

    Raises:
        TypeError: If `layers` is none of these.
        ValueError: If there are no layers, or a number is out of range.
    """

    def __init__(
        self, layers: Layers, weight: float | Scheduled = 1.0, name: str = "feature", channel_dim: int | None = None
    ) -> None:
        super().__init__(weight, name)
        self.layers, self.channel_dim = layers, channel_dim
        self._pairs: tuple[tuple[str, str], ...] | None = None if layers == "auto" else _pairs_of(name, layers)

    needs_places: ClassVar[bool] = False
    """Whether features are compared between places, so that vectors are no use."""

    def use_pairs(self, pairs: Mapping[str, str]) -> None:
        """Take these pairs for ``layers="auto"``, as far as the term can compare them.

        Raises:
            ValueError: If it can compare none.
        """
        if isinstance(pairs, LayerPairs):
            pairs = {row.student: row.teacher for row in pairs.rows if row.places > 1 or not self.needs_places}
        self._pairs = _pairs_of(self.name, pairs)

    @property
    def pairs(self) -> tuple[tuple[TapSpec, TapSpec], ...]:
        """The taps of the pairs.

        Raises:
            CompressionError: If layers are paired automatically and were not paired yet.
        """
        if self._pairs is None:
            raise CompressionError(
                f"The layers of {self.name!r} are 'auto' and were not paired yet: call `use_pairs(pair_layers(student, "
                "teacher, example))` first; the callback does."
            )
        return tuple((TapSpec(s), TapSpec(t)) for s, t in self._pairs)

    def taps(self) -> TapSpecs:
        """The outputs of the layers."""
        student, teacher = zip(*self.pairs, strict=True)
        return TapSpecs(student=student, teacher=teacher)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the features of one pair of layers in one call; they are as the layers returned them."""
        raise NotImplementedError

    def project(self, features: list[Tensor]) -> list[Any]:
        """What becomes of the student's features first; nothing by default."""
        return features

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average `loss` over pairs and calls."""
        losses = []
        for features, targets in self.calls(student, teacher):
            losses += [self.loss(s, t) for s, t in zip(self.project(features), targets, strict=True)]
        return mean_of(losses)

    def calls(self, student: Records, teacher: Records) -> list[tuple[list[Tensor], list[Tensor]]]:
        """For each call of the step the student's and the teacher's features, in the order of the pairs."""
        seen = [[feature_of(value) for value in student[s]] for s, _ in self.pairs]
        asked = [[feature_of(value) for value in teacher[t]] for _, t in self.pairs]
        counts = {len(values) for values in (*seen, *asked)}
        if len(counts) > 1:
            found = ", ".join(
                f"{s.module!r} {len(a)} and {t.module!r} {len(b)} times"
                for (s, t), a, b in zip(self.pairs, seen, asked, strict=True)
            )
            raise CompressionError(
                f"{self.name!r} pairs layers that were called differently often in one step: {found}. Pair layers "
                "that run once in each call of the student and of the teacher."
            )
        return [([values[i] for values in seen], [values[i] for values in asked]) for i in range(next(iter(counts), 0))]

    def widths(self, shapes: Shapes) -> list[tuple[int, int]]:
        """Channels of student and teacher for each pair."""
        return [(self._width(shapes.student[s]), self._width(shapes.teacher[t])) for s, t in self.pairs]

    def _width(self, shape: tuple[int, ...]) -> int:
        if len(shape) < 2:
            raise CompressionError(f"{self.name!r} watches a layer whose output {shape} has no channels.")
        return shape[channel_dim_of(shape, self.channel_dim)]

    def check_shapes(self, shapes: Shapes) -> None:
        """Refuse features that an edit would make incomparable; asked before the edit is final."""


def _pairs_of(name: str, layers: Layers) -> tuple[tuple[str, str], ...]:
    if isinstance(layers, str):
        layers = [layers]
    pairs = tuple(layers.items()) if isinstance(layers, Mapping) else tuple((layer, layer) for layer in layers)
    if not all(isinstance(s, str) and isinstance(t, str) for s, t in pairs):
        raise TypeError(f"layers of {name!r} are names, or a mapping from names to names; found {layers!r}")
    if not pairs:
        raise ValueError(f"{name!r} has no layers to compare; name some, or write layers='auto'.")
    return pairs


def feature_of(value: Any) -> Tensor:
    """Return the feature in what a layer returned: the first tensor.

    Raises:
        CompressionError: If there is none.
    """
    feature = next(tensors_in(value), None)
    if feature is None:
        raise CompressionError(f"A tapped layer returned a {type(value).__name__}, in which there is no tensor.")
    return feature


class ProjectedTerm(FeatureTerm):
    """A `FeatureTerm` that maps the student's features to the teacher's width; the map is trained with the student.

    Args:
        layers: See `FeatureTerm`.
        weight: See `FeatureTerm`.
        name: See `FeatureTerm`.
        channel_dim: See `FeatureTerm`.
        projector: ``"auto"`` projects where widths differ, ``"always"`` and ``"never"`` say what they say.
    """

    def __init__(
        self,
        layers: Layers,
        weight: float | Scheduled,
        name: str,
        channel_dim: int | None,
        projector: Literal["auto", "always", "never"],
    ) -> None:
        super().__init__(layers, weight, name, channel_dim)
        if projector not in ("auto", "always", "never"):
            raise ValueError(f"The projector of {name!r} is 'auto', 'always' or 'never'; found {projector!r}")
        self.projector = projector

    def build(self, shapes: Shapes) -> nn.Module | None:
        """Make a projector for each pair that needs one."""
        widths = {
            i: pair
            for i, pair in enumerate(self.widths(shapes))
            if self.projector == "always" or (self.projector == "auto" and pair[0] != pair[1])
        }
        if self.projector == "never":
            self.check_shapes(shapes)
        # A run with a projector draws the same dropout as one without; and Lightning seeds anew where there are several
        # processes, so what is drawn here may depend on the seed but not on what was drawn since.
        with isolated_rng((torch.initial_seed() + crc32(self.name.encode())) % 2**32):
            return Projectors(widths, self.make_projector) if widths else None

    def make_projector(self, student: int, teacher: int) -> nn.Module:
        """The map from the student's channels to the teacher's."""
        return Projector(student, teacher)

    def project(self, features: list[Tensor]) -> list[Any]:
        """Map the features to the teacher's width; channels are at 1 afterwards."""
        moved = [x.movedim(channel_dim_of(x.shape, self.channel_dim), 1) for x in features]
        return moved if self.module is None else list(self.module(moved))

    def fitted(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """A projected feature and its target, both with channels at 1 and of the same size."""
        target = teacher.movedim(channel_dim_of(teacher.shape, self.channel_dim), 1)
        return fit_maps(student, target, channel_dim=1, tokens=self.channel_dim is None and student.dim() == 3)

    def first_layer(self, index: int) -> str:
        """Name, below the owned module, of the layer that takes the features of a pair."""
        return f"layers.{index}"

    def follow(self, child: str, swaps: Sequence[Swap], shapes: Shapes) -> list[Edit]:
        """Cut the projectors' inputs as the student's channels were cut."""
        if not isinstance(shapes, Traced) or self.module is None:
            return super().follow(child, swaps, shapes)
        self.check_shapes(shapes)
        slices: dict[str, Any] = {}
        attributes: dict[str, Any] = {}
        for i, ((spec, _), (width, _)) in enumerate(zip(self.pairs, self.widths(shapes), strict=True)):
            name = self.first_layer(i)
            if not self._projects(i) or self.module.get_submodule(name).in_features == width:
                continue  # this pair has no projector, or its layer was not cut
            keep = shapes.kept(spec, channel_dim_of(shapes.student[spec], self.channel_dim), swaps)
            slices[f"{child}.{name}.weight"] = {"1": keep}
            attributes[f"{child}.{name}"] = {"in_features": width}
        return [{"kind": "channels.cut", "slices": slices, "attributes": attributes}] if slices else []

    def _projects(self, index: int) -> bool:
        return self.module is not None and str(index) in self.module.get_submodule("layers")._modules

    def check_shapes(self, shapes: Shapes) -> None:
        """Widths may differ only where there is a projector."""
        for i, ((s, t), (mine, theirs)) in enumerate(zip(self.pairs, self.widths(shapes), strict=True)):
            if mine != theirs and not self._projects(i):
                raise CompressionError(
                    f"{self.name!r} compares {s.module!r} ({mine} channels) with {t.module!r} ({theirs}) without a "
                    "projector. Give it projector='always', which follows cuts of the student."
                )


# -- FitNets -----------------------------------------------------------------------------------------------------------


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features, over all their elements.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", with the student's features already projected. The paper
    halves the sum of squares; the mean does not change with the size of the maps.

    Args:
        student: Projected features of any float type.
        teacher: Features of the same shape.

    Returns:
        A scalar in float32 or float64.

    Example:
        >>> hint_loss(torch.zeros(2, 3), torch.full((2, 3), 2.0)).item()
        4.0
    """
    return F.mse_loss(exact(student), exact(teacher))


class Hint(ProjectedTerm):
    """Hints (FitNets, Romero et al. 2015): the student's features, projected, are to be the teacher's.

    The projector is a linear map over channels (a 1x1 convolution), trained with the student and left out of exported
    files. It follows when channels of the student are cut. Maps of different size are averaged down to the smaller.

    Hints can hurt between architectures of different kind: on CIFAR-100 MobileNetV2 fell below plain training by hints
    of a VGG (RepDistiller's table). In the paper they come first and `KD` afterwards, see the guide on phases.

    Args:
        layers: ``"auto"`` (see `pair_layers`), a name, several names, or a mapping from the student's names to the
            teacher's.
        weight: >= 0; 100 is usual beside a loss of classification.
        projector: ``"auto"`` projects where widths differ; ``"always"`` also where they do not, as the paper does and
            as is needed if the student's channels will be cut; ``"never"``.
        channel_dim: Where the channels are; default: last for ``(B, tokens, D)``, else 1.
        name: Its name in logs.

    Raises:
        TypeError: If `layers` are no names.
        ValueError: If an argument is out of range.

    Example:
        >>> term = Hint({"layer3": "layer4"}, weight=100.0)
        >>> term.taps().teacher
        (TapSpec(module='layer4', what='output'),)
    """

    def __init__(
        self,
        layers: Layers = "auto",
        weight: float | Scheduled = 1.0,
        projector: Literal["auto", "always", "never"] = "auto",
        channel_dim: int | None = None,
        name: str = "hint",
    ) -> None:
        super().__init__(layers, weight, name, channel_dim, projector)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `hint_loss`; maps of different size are averaged down."""
        return hint_loss(*self.fitted(student, teacher))
