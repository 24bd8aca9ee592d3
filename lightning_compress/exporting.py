"""Write a model to a file that other programs read: safetensors, ONNX, or PyTorch's exported program.

The model is left as it is: what is written is its evaluation mode, without the helper modules of callbacks. A file
appears whole or not at all; an older one under the same name survives any failure.
"""

from __future__ import annotations

import base64
import copy
import importlib
import inspect
import io
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress import manifest as manifests
from lightning_compress.errors import CompressionError
from lightning_compress.layers import transformed_weight
from lightning_compress.targets import clean_name, unwrap

Format = Literal["safetensors", "onnx", "pt2"]
PathLike = str | os.PathLike[str]

_ALIASES = "lightning_compress.aliases"  # tied weights are stored once; name -> the name that holds the values
_TENSOR, _FLOAT = "__tensor__", "__float__"
_ONNX_INLINE_LIMIT = 1_800_000_000  # bytes; protobuf refuses 2 GiB, larger weights go into a file beside the graph


def export(
    model: nn.Module,
    path: PathLike,
    example_inputs: Any = None,
    format: Format | None = None,
    dynamic_batch: bool = True,
    manifest: Mapping[str, Any] | None = None,
    opset_version: int | None = None,
) -> Path:
    """Write a model's evaluation mode to a file.

    `.safetensors` holds the weights that the model computes with (soft masks are written out as zeros), with the
    manifest in the header: `lc.load` rebuilds the smaller architecture from it. `.onnx` and `.pt2` hold the graph of
    `forward` too and run without the model's code; both carry the manifest as metadata. In a distributed run call it
    on one rank.

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

    Returns:
        The path of the file.

    Raises:
        ValueError: The format is unknown.
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
    record = encode(manifests.of(model) if manifest is None else manifest)
    if kind == "safetensors":
        with _whole(target) as partial:
            _write_safetensors(unwrap(model), partial, record)
        return target
    if kind == "onnx":
        _require("onnx", "onnxscript", extra="onnx")
    program = _trace(model, example_inputs, dynamic_batch)
    with _whole(target) as partial:
        if kind == "onnx":
            _write_onnx(program, partial, record, opset_version)
        else:
            buffer = io.BytesIO()  # PyTorch's own file writer ends the whole process when the disk is full
            torch.export.save(program, buffer, extra_files={manifests.KEY: record})
            partial.write_bytes(buffer.getbuffer())
    return target


def _format(path: Path, format: Format | None) -> str:
    known = get_args(Format)
    kind = format if format is not None else path.suffix.removeprefix(".").lower()
    if kind not in known:
        asked = f"format={format!r}" if format is not None else f"the suffix {path.suffix!r} of {str(path)!r}"
        raise ValueError(f"{asked} is not a known format; use one of {', '.join(known)}")
    return kind


def _require(*packages: str, extra: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise CompressionError(
                f"this needs the package {package!r}, which cannot be imported ({error}); "
                f'run `pip install "lightning-compress[{extra}]"`'
            ) from error


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Gives a path to write to; what is there moves to the target at the end, unless something was raised."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder, because an ONNX graph refers to its weights file by name; beside the target, so that moving is atomic.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        partial = Path(folder) / target.name
        yield partial
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == partial):  # the graph last
            os.replace(file, target.with_name(file.name))


# ------------------------------------------------------------------------------------------------------- safetensors


def _weights(model: nn.Module) -> dict[str, Any]:
    """The state dict with the weights that the model computes with: soft masks and the like are written out."""
    state = {clean_name(name, model): value for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            with torch.no_grad():
                used = transformed_weight(module)
            if used is not weight:
                state[clean_name(f"{name}.weight" if name else "weight", model)] = used
    return manifests.without_auxiliary(state)


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


def encode(data: Mapping[str, Any]) -> str:
    """Plain data with tensors as JSON, without loss; lists of indices stay readable.

    Raises:
        TypeError: Something is neither dict (with string keys), list, str, int, float, bool, None nor dense tensor.

    Example:
        >>> import torch
        >>> from lightning_compress.exporting import decode, encode
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


# ------------------------------------------------------------------------------------------------------------ graphs


def _trace(model: nn.Module, example_inputs: Any, dynamic_batch: bool) -> torch.export.ExportedProgram:
    root = unwrap(model)
    args, kwargs = _arguments(root, example_inputs)
    called = getattr(example_inputs, "module", "")
    module = _evaluation_copy(root.get_submodule(called) if isinstance(called, str) else root)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    args, kwargs = tree_map(lambda x: x.detach().to(device) if isinstance(x, Tensor) else x, (args, kwargs))
    shapes: Any = None
    if dynamic_batch:
        args, kwargs, shapes = _free_batch(module, args, kwargs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")  # of torch's own RNNs
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        hint = " If it works for one batch size only, pass `dynamic_batch=False`." if dynamic_batch else ""
        raise CompressionError(
            f"`torch.export` cannot trace {type(module).__name__}.forward with the example inputs: "
            f"{type(error).__name__}: {error}\nA graph needs a forward without data-dependent Python control flow; "
            f"`.safetensors` has no such limit.{hint}"
        ) from error


def _arguments(root: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        example = getattr(root, "example_input_array", None)
    if example is None:
        raise CompressionError(
            f"a graph of {type(root).__name__} needs example inputs; pass `example_inputs=` (a tensor, a tuple or a "
            "dict), or set `example_input_array` on the LightningModule"
        )
    if hasattr(example, "args") and hasattr(example, "kwargs"):
        return tuple(example.args), dict(example.kwargs)
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def _evaluation_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without helpers and compiled wrappers, that shares the tensors of the original."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise CompressionError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and exporting must not "
            "touch the model itself; remove what cannot be copied, such as stored activations or open files"
        ) from error
    for part in list(twin.modules()):
        part.training = False  # not `eval()`: users override `train` with side effects
        for name, child in list(part._modules.items()):
            if name.startswith(manifests.AUXILIARY):
                del part._modules[name]
            elif child is not None:
                part._modules[name] = unwrap(child)
    return twin


def _free_batch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Arguments with at least two samples, and which of their dimensions are the batch."""
    leaves = tree_leaves((args, kwargs))
    sizes = [x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()]
    if not sizes:
        return args, kwargs, None

    def is_batch(x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == sizes[0]

    batch = torch.export.Dim("batch")
    by_parameter = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    shapes = tree_map(lambda x: {0: batch} if is_batch(x) else None, by_parameter)
    if sizes[0] == 1:  # tracing takes a size of 1 for a constant
        args, kwargs = tree_map(lambda x: torch.cat([x, x]) if is_batch(x) else x, (args, kwargs))
    return args, kwargs, shapes


def _write_onnx(program: torch.export.ExportedProgram, path: Path, record: str, opset_version: int | None) -> None:
    size = sum(t.numel() * t.element_size() for t in (*program.state_dict.values(), *program.constants.values()))
    try:
        onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset_version)
    except torch.onnx.errors.OnnxExporterError as error:
        raise CompressionError(f"ONNX has no equivalent for this model: {error}") from error
    assert onnx_program is not None  # what `dynamo=True` promises; for the type checker
    onnx_program.model.metadata_props[manifests.KEY] = record
    onnx_program.save(str(path), external_data=size > _ONNX_INLINE_LIMIT)
