"""Plain data with tensors as text, without loss: how manifests and reports travel inside files."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR, _FLOAT = "__tensor__", "__float__"


def encode(data: Mapping[str, Any]) -> str:
    """Plain data with tensors as JSON, without loss; lists of indices stay readable.

    Raises:
        TypeError: Something is neither dict (with string keys), list, str, int, float, bool, None nor dense tensor.

    Example:
        >>> import torch
        >>> from lightning_compress.encoding import decode, encode
        >>> encode({"keep": torch.tensor([0, 2])})
        '{"keep": {"__tensor__": "int64", "shape": [2], "values": [0, 2]}}'
        >>> decode(encode({"keep": torch.tensor([0, 2])}))
        {'keep': tensor([0, 2])}
    """
    return json.dumps(_to_json(data), allow_nan=False)


def _to_json(data: Any) -> Any:
    if isinstance(data, Tensor):
        return _tensor_to_json(data)
    if isinstance(data, Mapping):
        wrong = [key for key in data if not isinstance(key, str) or key in (_TENSOR, _FLOAT)]
        if wrong:
            raise TypeError(
                f"the keys of a manifest are strings, and {_TENSOR!r} is reserved; got the key {wrong[0]!r}"
            )
        return {key: _to_json(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_to_json(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return {_FLOAT: repr(data)}  # JSON has no word for these
    if data is None or isinstance(data, str | int | float):
        return data
    raise TypeError(f"a manifest holds plain data and tensors; got {type(data).__name__}: {data!r}")


def _tensor_to_json(tensor: Tensor) -> dict[str, Any]:
    value = tensor.detach().cpu().contiguous()
    head = {_TENSOR: str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if value.dtype is torch.int64:
        return {**head, "values": value.flatten().tolist()}
    return {**head, "base64": base64.b64encode(value.flatten().view(torch.uint8).numpy().tobytes()).decode()}


def decode(text: str) -> dict[str, Any]:
    """The inverse of `encode` (tuples come back as lists)."""

    def restore(found: dict[str, Any]) -> Any:
        if _FLOAT in found:
            return float(found[_FLOAT])
        if _TENSOR not in found:
            return found
        dtype = getattr(torch, found[_TENSOR])
        if "values" in found:
            return torch.tensor(found["values"], dtype=dtype).reshape(found["shape"])
        raw = bytearray(base64.b64decode(found["base64"]))
        flat = torch.frombuffer(raw, dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(found["shape"])

    data: dict[str, Any] = json.loads(text, object_hook=restore)
    return data
