"""The memory of contrastive distillation: an embedding of every sample of the data set, by student and by teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress.distillation.features import Projector
from lightning_compress.distillation.losses import exact, unit
from lightning_compress.errors import CompressionError

_EPS = 1e-7


def memory_nce_loss(positive: Tensor, negative: Tensor, samples: int) -> Tensor:
    """Noise-contrastive estimation: tell one pair that belongs together from many that were drawn.

    Tian et al. 2020, "Contrastive Representation Distillation", with ``N`` drawn samples out of ``M``: for normalised
    scores ``p`` of the true pair and ``n_j`` of the drawn ones,
    ``-log(p / (p + N / M)) - sum_j log((N / M) / (n_j + N / M))``, averaged over samples.

    Args:
        positive: Scores ``exp(<s, t> / T) / Z`` of the pairs that belong together, shape ``(B,)``.
        negative: Those of the drawn ones, shape ``(B, N)``.
        samples: ``M``, of the data set.

    Returns:
        A scalar >= 0.

    Example:
        >>> round(memory_nce_loss(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), samples=2).item(), 4)
        2.0794
    """
    chance = negative.shape[1] / samples
    told = (positive / (positive + chance + _EPS)).log()
    refused = (chance / (negative + chance + _EPS)).log().sum(1)
    return -(told + refused).mean()


class MemoryHead(nn.Module):
    """Maps features of student and teacher to embeddings, and contrasts them with a memory of all samples.

    Both memories are buffers: they are in checkpoints, so that a run goes on with them, and in no exported file. With
    several processes all write what all saw, so that the memories are the same everywhere.

    Args:
        student: Channels of the student.
        teacher: Channels of the teacher.
        size: Of the embeddings.
        samples: Of the data set; two times ``4 * samples * size`` bytes are kept.
        negatives: Samples drawn for each of the batch.
        temperature: > 0.
        momentum: How much of an embedding stays when its sample is seen again, in [0, 1).
        seed: Of what is drawn.

    Example:
        >>> head = MemoryHead(3, 5, size=8, samples=20, negatives=4, temperature=0.07, momentum=0.5)
        >>> loss = head((torch.randn(2, 3), torch.randn(2, 5), torch.tensor([7, 3])))
        >>> loss.shape, int(head.drawn[1])
        (torch.Size([]), 1)
    """

    student_memory: Tensor
    teacher_memory: Tensor
    normalizers: Tensor
    drawn: Tensor

    def __init__(
        self,
        student: int,
        teacher: int,
        size: int,
        samples: int,
        negatives: int,
        temperature: float,
        momentum: float,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.teacher = Projector(student, size), Projector(teacher, size)
        self.samples, self.negatives, self.temperature = samples, negatives, temperature
        self.momentum = momentum
        bound = (3 / size) ** 0.5  # a variance of 1 / size: vectors of about norm 1
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(samples, size).uniform_(-bound, bound))
        self.register_buffer("normalizers", torch.zeros(2))  # Z of both directions, fixed in the first step
        self.register_buffer("drawn", torch.tensor([seed, 0]))  # the seed, and how often it drew

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The loss of features (B, C), (B, C') of the samples with these numbers (B,)."""
        mine, theirs, index = features
        index = index.to(mine.device).long()
        s = unit(exact(self.student(mine)), 1)
        t = unit(exact(self.teacher(theirs)), 1)
        others = self._draw(len(index)).to(index.device)  # (B, N)
        loss = self._contrast(s, exact(self.teacher_memory), index, others, 0)
        loss = loss + self._contrast(t, exact(self.student_memory), index, others, 1)
        self._remember(s.detach(), t.detach(), index)
        return loss

    def _draw(self, batch: int) -> Tensor:
        rank = dist.get_rank() if _is_distributed() else 0
        generator = torch.Generator().manual_seed(hash((*self.drawn.tolist(), rank)) % 2**63)
        self.drawn[1] += 1
        return torch.randint(self.samples, (batch, self.negatives), generator=generator)

    def _contrast(self, embedding: Tensor, memory: Tensor, index: Tensor, others: Tensor, direction: int) -> Tensor:
        positive = (embedding * memory[index]).sum(1)
        negative = torch.einsum("bd,bnd->bn", embedding, memory[others])
        scores = [(value / self.temperature).exp() for value in (positive, negative)]
        if not bool(self.normalizers[direction] > 0):
            with torch.no_grad():
                mean = torch.cat([scores[0][:, None], scores[1]], 1).mean()
                if _is_distributed():
                    dist.all_reduce(mean)
                    mean = mean / dist.get_world_size()
                self.normalizers[direction] = mean * self.samples
        z = exact(self.normalizers[direction]).detach().clone()
        return memory_nce_loss(scores[0] / z, scores[1] / z, self.samples)

    @torch.no_grad()
    def _remember(self, s: Tensor, t: Tensor, index: Tensor) -> None:
        seen = _of_all_processes(torch.cat([s, t], 1), index)
        embeddings, index = seen
        known, where = torch.unique(index, return_inverse=True)
        # A sample that is twice in a batch is remembered as it was the last time, whatever the device.
        last = torch.zeros_like(known).scatter_reduce(0, where, torch.arange(len(where), device=where.device), "amax")
        for memory, new in zip((self.student_memory, self.teacher_memory), embeddings[last].chunk(2, 1), strict=True):
            moved = self.momentum * exact(memory[known]) + (1 - self.momentum) * new
            memory[known] = unit(moved, 1).to(memory.dtype)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_all_processes(embeddings: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What every process saw, in the order of ranks; batches may have different sizes."""
    if not _is_distributed():
        return embeddings, index
    sizes = [torch.zeros(1, dtype=torch.int64, device=index.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(index)], device=index.device))
    most = max(int(size) for size in sizes)
    found = []
    for value in (embeddings, index):
        padded = value.new_zeros(most, *value.shape[1:])
        padded[: len(value)] = value
        parts = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        found.append(torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]))
    return found[0], found[1]


def numbers_of(batch: Any, where: int | str, samples: int, rows: int) -> Tensor:
    """Find the numbers of a batch's samples.

    Args:
        batch: What ``training_step`` was given.
        where: Position in a tuple or list, or key of a dict.
        samples: How many samples there are.
        rows: How many are in the batch.

    Raises:
        CompressionError: If there are no such numbers.

    Example:
        >>> numbers_of({"x": 0, "number": torch.tensor([3, 1])}, "number", samples=4, rows=2)
        tensor([3, 1])
    """
    advice = (
        "Let the dataset return each sample's number, from 0 on, and say where it is in the batch: index=2 for "
        "(x, y, number), or a key."
    )
    try:
        found = batch[where]
    except (LookupError, TypeError) as error:
        kind = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        if isinstance(batch, tuple | list):
            kind += f" of {len(batch)}"
        raise CompressionError(f"There is nothing at {where!r} of the batch ({kind}). {advice}") from error
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex() or found.shape != (rows,):
        shape = f" of {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else ""
        raise CompressionError(
            f"At {where!r} of the batch is a {type(found).__name__}{shape}, and one whole number for each of the "
            f"{rows} samples is needed. {advice}"
        )
    least, most = (int(found.min()), int(found.max())) if len(found) else (0, 0)
    if least < 0 or most >= samples:
        raise CompressionError(
            f"The batch has samples with numbers from {least} to {most}, and the memory has room for 0 to "
            f"{samples - 1}: samples= is the size of the whole data set."
        )
    return found
