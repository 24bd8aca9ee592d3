"""Random augmentation that comes back: each sample is augmented by a seed of its own."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_compress.isolation import isolated_rng


class Replayed(Dataset[Any]):
    """A dataset whose random augmentation repeats, so that a teacher's answers can be stored and found again.

    While sample ``i`` is made, the generators of Python, NumPy and PyTorch are seeded by ``(seed, i, variant)``;
    afterwards they go on as if nothing had happened. With ``variants=1`` a sample looks the same in every epoch; with
    more, one of so many looks is drawn each time by the ordinary generators. The teacher is asked ``variants`` times as
    much, and the student sees more. Batches, labels and order are as they were.

    What draws its randomness elsewhere (a generator of its own, mixing in ``collate_fn`` or in ``training_step``)
    does not repeat: then answers are not found, and never a wrong one, since they are found by what is asked.

    Args:
        dataset: Has ``__getitem__`` and ``__len__``.
        variants: Different looks of a sample, >= 1.
        seed: Other looks for another seed.

    Raises:
        TypeError: If the dataset can only be iterated.
        ValueError: If there is less than one variant.

    Example:
        >>> class Noisy(Dataset):
        ...     def __len__(self):
        ...         return 2
        ...     def __getitem__(self, index):
        ...         return torch.rand(1).item()
        >>> plain, replayed = Noisy(), Replayed(Noisy())
        >>> plain[0] == plain[0], replayed[0] == replayed[0], replayed[0] == replayed[1]
        (False, True, False)
    """

    def __init__(self, dataset: Any, variants: int = 1, seed: int = 0) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(
                f"Replayed takes a dataset with samples by number (__getitem__ and __len__); {type(dataset).__name__} "
                "can only be iterated, so a sample has no number to be seeded by"
            )
        if isinstance(variants, bool) or not isinstance(variants, int) or variants < 1:
            raise ValueError(f"variants is a whole number of at least 1; got {variants!r}")
        self.dataset, self.variants, self.seed = dataset, variants, seed

    def __len__(self) -> int:
        """As many samples as there were."""
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """The sample, augmented by its own seed."""
        variant = int(torch.randint(self.variants, ())) if self.variants > 1 else 0
        text = f"{self.seed}/{index}/{variant}"
        with isolated_rng(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")):
            return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        """What the dataset has besides (`classes`, say); its way to fetch several samples at once is not replayed."""
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)
