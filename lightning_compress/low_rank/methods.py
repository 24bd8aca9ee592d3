"""What every method of factorization can do, and what those that see a matrix have in common.

A method knows three forms of a layer: the dense weight; *factors*, the small tensors in a form that is convenient for
algebra, with one leading entry for each group of a convolution; and *weights*, the same numbers in the shapes of the
small layers (`modules`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_compress.low_rank import matrices

MethodName = Literal["svd", "channel", "spatial", "tucker", "cp", "embedding", "gates"]
Ranks = tuple[int, ...]
Shape = tuple[int, ...]


class Method(ABC):
    """How one kind of weight becomes a product.

    `shape` is that of the dense weight everywhere and `groups` the number of groups of its convolution (for ``gates``
    the number of gates of a recurrent layer).
    """

    name: ClassVar[MethodName]
    ranks: ClassVar[int] = 1
    """How many ranks the method has."""
    whitens: ClassVar[bool] = False
    """Whether the covariance of its inputs can say what matters."""

    @abstractmethod
    def full(self, shape: Shape, groups: int) -> Ranks:
        """The ranks at which the product can be any dense weight."""

    @abstractmethod
    def factorize(self, weight: Tensor, ranks: Ranks, groups: int, covariance: Tensor | None = None) -> list[Tensor]:
        """The factors nearest to a dense weight, in fp32 or fp64.

        Args:
            weight: The dense weight.
            ranks: One for each rank of the method, from 1 to `full`.
            groups: Groups of the convolution.
            covariance: Of the inputs of the first factor (G, n, n), if the method `whitens`.

        Raises:
            CompressionError: If the weight is not finite or the decomposition does not converge.
        """

    @abstractmethod
    def merge(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> Tensor:
        """The dense weight; differentiable, and linear in each factor."""

    @abstractmethod
    def to_weights(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """The factors in the shapes of the small layers, first layer first."""

    @abstractmethod
    def from_weights(self, weights: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """The inverse of `to_weights`."""

    @abstractmethod
    def refit(self, factors: Sequence[Tensor], weight: Tensor, groups: int) -> list[Tensor]:
        """Other factors on the same basis that fit a dense weight best; only one of the tensors changes."""

    @abstractmethod
    def sizes(self, shape: Shape, ranks: Ranks, groups: int) -> list[int]:
        """Elements of the weight of each small layer."""

    @abstractmethod
    def rank_dims(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each rank the (factor, dimension) pairs that it counts."""

    def pad(self, factors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
        """The same product with more directions, all of which are zero in every factor."""
        padded = list(factors)
        for rank, places in zip(ranks, self.rank_dims(), strict=True):
            for factor, dim in places:
                value = padded[factor]
                missing = list(value.shape)
                missing[dim] = rank - missing[dim]
                padded[factor] = torch.cat([value, value.new_zeros(missing)], dim)
        return padded

    def values(self, weight: Tensor, groups: int, covariance: Tensor | None = None) -> tuple[Tensor, ...]:
        """Singular values (G, k) by which each rank is chosen, descending."""
        matrices_ = self.unfoldings(weight, groups)
        if covariance is not None and self.whitens:
            root, _ = matrices.whitener(covariance)
            matrices_ = (matrices.precise(matrices_[0]).double() @ root,)
        return tuple(matrices.singular_values(matrix) for matrix in matrices_)

    @abstractmethod
    def unfoldings(self, weight: Tensor, groups: int) -> tuple[Tensor, ...]:
        """The matrices (G, m, n) whose singular values say how each rank may be chosen."""


class MatrixMethod(Method):
    """A weight seen as a matrix M = B A; the first small layer is A, the second B."""

    whitens = True

    @abstractmethod
    def view(self, weight: Tensor, groups: int) -> Tensor:
        """The matrix (G, m, n)."""

    @abstractmethod
    def unview(self, matrix: Tensor, shape: Shape, groups: int) -> Tensor:
        """The inverse of `view`."""

    def full(self, shape: Shape, groups: int) -> Ranks:
        """See `Method.full`."""
        return (min(self.view(torch.empty(shape, device="meta"), groups).shape[1:]),)

    def unfoldings(self, weight: Tensor, groups: int) -> tuple[Tensor, ...]:
        """See `Method.unfoldings`."""
        return (self.view(weight, groups),)

    def factorize(self, weight: Tensor, ranks: Ranks, groups: int, covariance: Tensor | None = None) -> list[Tensor]:
        """See `Method.factorize`; the truncated SVD is the best (Eckart and Young, 1936)."""
        weight = matrices.precise(weight)
        b, a = matrices.best_factors(self.view(weight, groups), ranks[0], covariance)
        return [a.to(weight.dtype), b.to(weight.dtype)]

    def merge(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> Tensor:
        """See `Method.merge`."""
        return self.unview(factors[1] @ factors[0], shape, groups)

    def refit(self, factors: Sequence[Tensor], weight: Tensor, groups: int) -> list[Tensor]:
        """See `Method.refit`."""
        a = matrices.precise(factors[0])
        matrix = self.view(matrices.precise(weight), groups).to(a.dtype)
        return [a, matrix @ torch.linalg.pinv(a)]

    def sizes(self, shape: Shape, ranks: Ranks, groups: int) -> list[int]:
        """See `Method.sizes`."""
        g, m, n = self.view(torch.empty(shape, device="meta"), groups).shape
        return [g * ranks[0] * n, g * m * ranks[0]]

    def rank_dims(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """See `Method.rank_dims`."""
        return (((0, 1), (1, 2)),)
