"""Write a model to a file that other programs read: safetensors, ONNX, or PyTorch's exported program.

The model is left as it is: what is written is its evaluation mode, without the helper modules of callbacks. A file
appears whole or not at all; an older one under the same name survives any failure.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress import manifest as manifests
from lightning_compress.calibration import calibration_calls
from lightning_compress.encoding import decode as decode
from lightning_compress.encoding import encode as encode
from lightning_compress.errors import CompressionError
from lightning_compress.graphs import trace, write_onnx
from lightning_compress.probe import from_example_inputs
from lightning_compress.targets import clean_name, unwrap
from lightning_compress.transforms import baked, transform_names
from lightning_compress.writing import PathLike, require, whole

Format = Literal["safetensors", "onnx", "pt2"]

_ALIASES = "lightning_compress.aliases"  # tied weights are stored once; name -> the name that holds the values


def export(
    model: nn.Module,
    path: PathLike,
    example_inputs: Any = None,
    format: Format | None = None,
    dynamic_batch: bool = True,
    manifest: Mapping[str, Any] | None = None,
    opset_version: int | None = None,
    calibration: Any = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Path:
    """Write a model's evaluation mode to a file.

    `.safetensors` holds the weights that the model computes with (soft masks are written out as zeros), with the
    manifest in the header: `lc.load` rebuilds the smaller architecture from it. `.onnx` and `.pt2` hold the graph of
    `forward` too and run without the model's code; both carry the manifest as metadata. In a distributed run call it
    on one rank.

    With `calibration` what is written is a model of integers, about a quarter of the size: weights as int8, and
    activations as uint8 where its quantizers have them or, in a model without quantizers, in the ranges seen on the
    calibration data. The `.onnx` file is for ONNX Runtime and OpenVINO; `.pt2` is an `Int8Artifact`.

    Args:
        model: Any module, a LightningModule included; pass the module that the callbacks edited, since the manifest
            belongs to it and not to its parts.
        path: Where to write; the suffix names the format.
        example_inputs: For graphs: a tensor, a tuple of arguments, a dict of keyword arguments, or an `ExampleCall`
            (which exports the part of the model that it calls). Default: the module's `example_input_array`.
        format: `"safetensors"`, `"onnx"` or `"pt2"`, when the suffix does not say it.
        dynamic_batch: Let graphs take any batch size. The batch is dimension 0 of the first tensor and of every other
            tensor with the same size there.
        manifest: What was done to the model; default: its own record.
        opset_version: Of ONNX; default: the exporter's.
        calibration: Real inputs: a `DataLoader`, a dataset, a LightningDataModule, or an iterable of batches or of
            `ExampleCall`s.
        prepare: Takes a batch of `calibration` and returns the model's arguments; default: of a tuple the first
            elements, of a dict the entries that `forward` takes.

    Returns:
        The path of the file.

    Raises:
        ValueError: The format is unknown, or holds no integers.
        TypeError: `model` is no module.
        OSError: The file cannot be written, because the disk is full or the place is not writable.
        CompressionError: The model cannot be written in this format, or an optional package is missing.

    Example:
        >>> import tempfile, torch
        >>> from lightning_compress.exporting import export
        >>> from lightning_compress.loading import load
        >>> net = torch.nn.Linear(4, 2)
        >>> path = export(net, tempfile.mkdtemp() + "/net.safetensors")
        >>> load(torch.nn.Linear(4, 2), path)
        Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a module; got {model!r:.80}")
    target = Path(path)
    kind = _format(target, format)
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise CompressionError(f"{meta!r} is on the meta device, so it has no values to write; load the weights first")
    if target.is_dir():
        raise CompressionError(f"{str(target)!r} is a folder; give the path of a file, such as 'folder/model.{kind}'")
    done = manifests.of(model) if manifest is None else manifest
    if calibration is not None:
        return _export_integers(
            model, target, kind, example_inputs, calibration, prepare, done, dynamic_batch, opset_version
        )
    record = encode(done)
    if kind == "safetensors":
        with whole(target) as partial:
            _write_safetensors(unwrap(model), partial, record)
        return target
    if kind == "onnx":
        require("onnx", "onnxscript", extra="onnx")
    program = trace(model, example_inputs, dynamic_batch)
    with whole(target) as partial:
        if kind == "onnx":
            write_onnx(program, partial, {manifests.KEY: record}, opset_version)
        else:
            buffer = io.BytesIO()  # PyTorch's own file writer ends the whole process when the disk is full
            torch.export.save(program, buffer, extra_files={manifests.KEY: record})
            partial.write_bytes(buffer.getbuffer())
    return target


def _export_integers(
    model: nn.Module,
    target: Path,
    kind: str,
    example_inputs: Any,
    calibration: Any,
    prepare: Callable[[Any], Any] | None,
    manifest: Mapping[str, Any],
    dynamic_batch: bool,
    opset_version: int | None,
) -> Path:
    from lightning_compress.quantization.integer.artifact import Int8Artifact

    if kind == "safetensors":
        raise ValueError(
            "a safetensors file holds weights and no graph, so nothing in it could be integer; give a path that ends "
            "in '.onnx' or '.pt2', or leave `calibration` out"
        )
    if kind == "onnx":
        require("onnx", "onnxscript", extra="onnx")
    example = None if example_inputs is None else from_example_inputs(example_inputs)
    calls = list(calibration_calls(model, calibration, example, prepare))
    if not calls:
        raise CompressionError("`calibration` holds no batch; pass some batches of real inputs")
    artifact = Int8Artifact.of(model, example or calls[0], calls, manifest, dynamic_batch=dynamic_batch)
    return artifact.to_onnx(target, opset_version) if kind == "onnx" else artifact.save(target)


def _format(path: Path, format: Format | None) -> str:
    known = get_args(Format)
    kind = format if format is not None else path.suffix.removeprefix(".").lower()
    if kind not in known:
        asked = f"format={format!r}" if format is not None else f"the suffix {path.suffix!r} of {str(path)!r}"
        raise ValueError(f"{asked} is not a known format; use one of {', '.join(known)}")
    return kind


# ------------------------------------------------------------------------------------------------------- safetensors


def _weights(model: nn.Module) -> dict[str, Any]:
    """The state dict with the weights that the model computes with: soft masks and the like are written out."""
    state = {clean_name(name, model): value for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            with torch.no_grad():
                used = baked(module, "weight", weight)
            if used is not weight:
                state[clean_name(f"{name}.weight" if name else "weight", model)] = used
    kept = [clean_name(prefix, model) for prefix in transform_names(model)]
    ours = {name: value for name, value in state.items() if name.startswith(tuple(f"{prefix}." for prefix in kept))}
    return {**manifests.without_auxiliary(state), **ours}


def _plain_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Separate, contiguous tensors in host memory, and the names that are only another name for one of them."""
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in _weights(model).items():
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
            raise CompressionError(
                f"{name!r} is a {type(value).__name__} that safetensors cannot hold (it stores plain dense tensors); "
                "convert or gather it first, for example with `full_tensor()`, or leave it out of the state dict"
            )
        tensor = value.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        storage = tensor.untyped_storage().data_ptr()
        shared = tensor.device.type == "cpu" and storage in storages  # the format refuses overlapping tensors
        state[name] = tensor.cpu().clone(memory_format=torch.contiguous_format) if shared else tensor.cpu().contiguous()
        storages.add(storage)
    return state, aliases


def _write_safetensors(model: nn.Module, path: Path, record: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state, aliases = _plain_state(model)
    header = {"format": "pt", manifests.KEY: record}
    if aliases:
        header[_ALIASES] = json.dumps(aliases)
    try:
        save_file(state, str(path), metadata=header)
    except SafetensorError as error:  # its own class for what elsewhere is an OSError
        raise OSError(f"{path.name!r} cannot be written: {error}") from error


def read_safetensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a file that `export` wrote, or any other safetensors file.

    Args:
        path: The file.

    Returns:
        The state dict, with every name of a tied weight, and the manifest; `None` if the file has none.

    Raises:
        CompressionError: The file is missing or damaged.

    Example:
        >>> import tempfile, torch
        >>> from lightning_compress.exporting import export, read_safetensors
        >>> state, manifest = read_safetensors(export(torch.nn.Linear(4, 2), tempfile.mkdtemp() + "/a.safetensors"))
        >>> sorted(state), manifest
        (['bias', 'weight'], {'version': 1, 'edits': []})
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CompressionError(f"{str(path)!r} cannot be read as safetensors ({error}); check the path") from error
    try:
        record = decode(header[manifests.KEY]) if manifests.KEY in header else None
        aliases = dict(json.loads(header.get(_ALIASES, "{}")))
        if not isinstance(record, dict | None) or not state.keys() >= set(aliases.values()):
            raise TypeError("it is not what `export` writes")
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CompressionError(
            f"the record of compression in {str(path)!r} cannot be read ({type(error).__name__}: {error}); the file is "
            "damaged, or another program wrote under the key 'lightning_compress'"
        ) from error
    return state | {name: state[holder] for name, holder in aliases.items()}, record
