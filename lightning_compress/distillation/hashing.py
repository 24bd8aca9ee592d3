"""Keys of samples and of models: what decides whether a stored answer is the answer to this question.

A multilinear hash over 32-bit words: each word times a random 64-bit number, summed modulo 2^64, in four lanes. Two
different contents of one form share a key with probability below 2^-128, whatever they are (they were not chosen by
somebody who knows the numbers: it is no cryptographic hash). It is integer arithmetic, so every device computes the
same, and a GPU computes it where the data are: only the keys are copied.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in

LANES = 4
_BLOCK = 1 << 16
_SEED = 0x5EED


@functools.lru_cache(maxsize=64)
def _numbers(block: int, device: torch.device) -> Tensor:
    """The random factors of one block of words, shape (LANES, _BLOCK), the same everywhere and always."""
    generator = torch.Generator().manual_seed(_SEED + block)
    low = torch.iinfo(torch.int64).min
    high = torch.iinfo(torch.int64).max
    return torch.randint(low, high, (LANES, _BLOCK), generator=generator).to(device)


def _words(rows: Tensor) -> Tensor:
    """The bytes of each row as int32, padded with zeros; (B, ...) to (B, n)."""
    if rows.dtype is torch.bool:
        rows = rows.to(torch.uint8)
    flat = rows.detach().contiguous().reshape(len(rows), -1)
    data = flat.view(torch.uint8) if flat.numel() else flat.new_zeros(len(rows), 0, dtype=torch.uint8)
    spare = -data.shape[1] % 4
    return (nn.functional.pad(data, (0, spare)) if spare else data.contiguous()).view(torch.int32)


@torch.no_grad()
def row_hash(rows: Tensor, begin: int = 0) -> Tensor:
    """Hash each row of a tensor.

    Args:
        rows: Shape ``(B, ...)``, any type that is stored as plain numbers.
        begin: How many blocks of words were hashed before, so that several tensors make one key.

    Returns:
        Shape ``(B, 4)``, int64, on the device of the rows.

    Example:
        >>> keys = row_hash(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]))
        >>> torch.equal(keys[0], keys[2]), torch.equal(keys[0], keys[1])
        (True, False)
    """
    words = _words(rows)
    total = torch.zeros(len(rows), LANES, dtype=torch.int64, device=rows.device)
    for number, block in enumerate(torch.split(words, _BLOCK, 1)):
        factors = _numbers(begin + number, rows.device)[:, : block.shape[1]]
        wide = block.long()
        for lane in range(LANES):
            total[:, lane] += (wide * factors[lane]).sum(1)
    return total


def _salt(text: str, device: torch.device) -> Tensor:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.int64).to(device)


def sample_keys(question: Any) -> Tensor:
    """A key for each sample of what a model is asked.

    Tensors whose first dimension is the batch (that of the first tensor) count with their row; all other tensors and
    values count for every sample. The form (names, types, shapes) counts too.

    Args:
        question: Arguments, nested as they are.

    Returns:
        Shape ``(B, 4)``, int64.

    Raises:
        CompressionError: If there is no tensor with a batch.

    Example:
        >>> a = sample_keys(((torch.tensor([[1], [2]]),), {"flag": True}))
        >>> b = sample_keys(((torch.tensor([[2], [1]]),), {"flag": True}))
        >>> torch.equal(a[0], b[1]), torch.equal(a[0], sample_keys(((torch.tensor([[1]]),), {"flag": False}))[0])
        (True, False)
    """
    first = next((t for t in tensors_in(question) if t.dim() > 0), None)
    if first is None:
        raise CompressionError(
            "The teacher is asked without a tensor that has a batch, so its answers have no samples to be stored by; "
            "leave the cache out."
        )
    leaves, form = tree_flatten(question)
    described, begin = [str(form)], 0
    total = torch.zeros(len(first), LANES, dtype=torch.int64, device=first.device)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            described.append(repr(leaf))
            continue
        own = leaf.dim() > 0 and len(leaf) == len(first)
        rows = leaf if own else leaf.reshape(1, -1)
        described.append(f"{leaf.dtype} {tuple(leaf.shape[1:]) if own else tuple(leaf.shape)} {own}")
        total = total + row_hash(rows, begin).to(total.device)
        begin += rows[0].numel() * rows.element_size() // (4 * _BLOCK) + 1
    return total + _salt(";".join(described), total.device)


def content_digest(module: nn.Module) -> str:
    """A SHA-256 over every value of a model's parameters and buffers, and over what its layers say they are.

    Unlike `Teacher.fingerprint`, which looks at a few values, no change of a weight escapes it. Code that changes
    without changing ``repr`` does: the cache asks the teacher again now and then.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> _ = other.load_state_dict(one.state_dict())
        >>> same = content_digest(one) == content_digest(other)
        >>> _ = other.weight.data[0, 0].add_(1e-3)
        >>> same, content_digest(one) == content_digest(other)
        (True, False)
    """
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__} {module!r}".encode())
    for name, value in sorted([*module.named_parameters(), *module.named_buffers()]):
        # A collective for sharded weights, so every process computes it.
        whole: Any = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)};".encode())
        if whole.numel():
            flat = _words(whole.detach().reshape(1, -1))
            rows = nn.functional.pad(flat, (0, -flat.shape[1] % _BLOCK)).view(-1, _BLOCK)
            digest.update(row_hash(rows).cpu().numpy().tobytes())
    return digest.hexdigest()
