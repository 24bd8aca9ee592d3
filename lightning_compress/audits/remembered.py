"""What the dense model did in an audit, on disk, so that the next compressed model does not pay for it again."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in
from lightning_compress.writing import PathLike, whole

FORMAT = 1
_SAME = 1e-4  # of the largest logit: threads and kernels move the last bits, another model moves more
_LARGEST = 1 << 28  # bytes of one part: points of attacks on large images are not kept
_ANSWERS = "answers"
Parts = Mapping[str, Tensor]


class Remembered:
    """Results of a dense model, by what they depend on.

    One file holds the results for one dense model, one set of examples, one seed and one version of this package; its
    name is a digest of these, and so of the model's weights, code and structure. Parts of audits are kept by their own
    arguments. The file is used only if its contents have the checksum that they were written with, and if the dense
    model still answers the audited examples as it did then.

    Args:
        folder: Where files are.
        dense: The model.
        logits: What it answers now, (N, ...).
        about: What else results depend on: examples, seed, task, as plain values and tensors.

    Attributes:
        note: Why what was there is not used, for the reader of the card; empty if it is, or if there was nothing.
        hits: How many parts were found.
        misses: How many had to be computed.

    Raises:
        CompressionError: The model's weights cannot be read, so nothing could say whether it is still the same.
    """

    def __init__(self, folder: PathLike, dense: ModelHandle, logits: Tensor, about: Mapping[str, Any]) -> None:
        content = {"format": FORMAT, "dense": fingerprint(dense), "versions": _versions(), **about}
        self.digest = digest_of(content)
        self.path = Path(folder) / f"dense-{self.digest[:32]}.safetensors"
        self.note, self.hits, self.misses = "", 0, 0
        self._new: set[str] = set()
        self._held = self._read(logits.detach().cpu())

    def get(self, part: str, arguments: Mapping[str, Any], compute: Callable[[], Parts]) -> dict[str, Tensor]:
        """Tensors of one part of an audit, from the file, or computed and then kept.

        Args:
            part: Such as ``"robustness"``.
            arguments: All that it depends on besides what the file is named after.
            compute: Makes them, with names of their own.

        Returns:
            Name -> tensor, on the CPU where they were read.
        """
        head = f"{part}|{digest_of(dict(arguments))[:32]}|"
        found = {name[len(head) :]: tensor for name, tensor in self._held.items() if name.startswith(head)}
        if found:
            self.hits += 1
            return found
        self.misses += 1
        made = {name: tensor.detach() for name, tensor in compute().items()}
        if made and sum(tensor.nbytes for tensor in made.values()) <= _LARGEST:
            for name, tensor in made.items():
                self._held[head + name] = tensor.cpu().contiguous().clone()
                self._new.add(head + name)
        return made

    def save(self) -> None:
        """Write what is new; the file appears whole or not at all. A full disk is noted, and costs no result."""
        if not self._new:
            return
        header = {"digest": self.digest, "content": _checksum(self._held)}
        try:
            with whole(self.path) as partial:
                partial.write_bytes(save(self._held, header))
        except OSError as error:
            self.note = f"What the dense model did could not be kept in {str(self.path)!r}: {error}"
            return
        self._new.clear()

    def _read(self, logits: Tensor) -> dict[str, Tensor]:
        fresh = {_ANSWERS: logits.contiguous().clone()}
        if not self.path.exists():
            return fresh
        reason = ""
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata() or {}
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, OSError, ValueError) as error:
            held, header, reason = {}, {}, f"it cannot be read ({error})"
        if not reason and (header.get("digest") != self.digest or header.get("content") != _checksum(held)):
            reason = "its contents are not those that were written"
        if not reason and not _alike(held.get(_ANSWERS), logits):
            reason = "the dense model answers otherwise than it did"
        if not reason:
            return held
        self.note = f"The results of the dense model in {str(self.path)!r} are not used, but computed anew: {reason}."
        return fresh


def fingerprint(handle: ModelHandle) -> str:
    """A digest of a model: its class, its code, its structure, every weight and buffer, and how it is called.

    Args:
        handle: The model, and its twin if it has one.

    Raises:
        CompressionError: The model is no module; a function may depend on anything.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = fingerprint(ModelHandle(net))
        >>> _ = net.weight.data.add_(1e-3)
        >>> fingerprint(ModelHandle(net)) == before
        False
    """
    parts: list[Any] = [handle.batch_size, handle.straight_through, _code(handle.select), _space(handle.space)]
    for module in (handle.deployed, handle.twin):
        if module is None:
            continue
        if not isinstance(module, nn.Module):
            raise CompressionError(
                f"the reference is a {type(module).__name__}, and what it depends on cannot be read: results of it "
                "cannot be kept. Leave `cache=` out, or pass a torch.nn.Module"
            )
        parts += [repr(module), {name: _code(type(part).forward) for name, part in module.named_modules()}]
        parts += [dict(module.named_parameters()), dict(module.named_buffers())]
    return digest_of(parts)


def digest_of(value: Any) -> str:
    """SHA-256 of plain values and tensors, in which order keys of mappings stand does not matter.

    Example:
        >>> digest_of({"a": 1, "b": [2.0]}) == digest_of({"b": [2.0], "a": 1})
        True
    """
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def to_text(value: Any) -> Tensor:
    """Plain data as a tensor of bytes, for results that are no tensors."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def from_text(tensor: Tensor) -> Any:
    """What `to_text` was given.

    Example:
        >>> from_text(to_text({"a": [1, None]}))
        {'a': [1, None]}
    """
    return json.loads(bytes(tensor.tolist()))


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    else:
        yield f"{type(value).__name__} {value!r}".encode()


def _checksum(tensors: Parts) -> str:
    return digest_of(dict(tensors))


def _alike(then: Tensor | None, now: Tensor) -> bool:
    if then is None or then.shape != now.shape:
        return False
    room = _SAME * max(float(now.abs().max()), 1e-12) if now.numel() else 0.0
    return bool(((then - now).abs() <= room).all())


def _space(space: InputSpace | None) -> Any:
    return None if space is None else [space.low, space.high, space.mean, space.std, space.mutable]


def _code(function: Any) -> Any:
    """The bytecode of a function, which names that the user may reuse do not replace."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))
    constants = [c for c in code.co_consts if isinstance(c, int | float | str | bool | type(None))]
    return [code.co_code.hex(), constants, list(code.co_names)]


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of what computes: this package down to the source of its audits, PyTorch, Captum."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    found = [f"audits {digest.hexdigest()}"]
    for package in ("lightning-compress", "torch", "captum"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} absent")
    return tuple(found)


def devices_of(*values: Any) -> list[str]:
    """Where tensors live: other devices have other last bits."""
    return sorted({tensor.device.type for value in values for tensor in tensors_in(value)})
