"""Answers on disk: records found by the key of what was asked, in files that several processes write and read.

Each process writes files of its own, whole or not at all, and reads everybody's (memory-mapped: only the rows that are
asked for are read). A record carries a hash of its content, and is not believed if that is wrong.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_compress.distillation.hashing import row_hash
from lightning_compress.distillation.top_k import TopK
from lightning_compress.errors import CompressionError
from lightning_compress.writing import whole

_MOST_ROWS = 1 << 16  # that wait in memory

Columns = dict[str, Tensor]
"""Tensors of the same number of rows, by name."""


# -- values as columns -------------------------------------------------------------------------------------------------


def pack(value: Any, rows: int) -> tuple[Columns, str]:
    """Take a value apart into tensors with one row a sample, and the form in which they belong together.

    Args:
        value: A tensor, or nested tuples, lists and mappings of such; something with ``logits`` counts as these alone.
            In a mapping, what has no row for each sample (a loss, None) is left out.
        rows: How many samples there are.

    Raises:
        CompressionError: If a part has no row for each sample.

    Example:
        >>> columns, form = pack({"logits": torch.ones(2, 3), "loss": torch.tensor(1.0)}, rows=2)
        >>> list(columns), unpack(columns, form)["logits"].shape
        (['0'], torch.Size([2, 3]))
    """
    columns: Columns = {}

    def walk(part: Any) -> Any:
        if isinstance(part, Tensor) and part.dim() > 0 and len(part) == rows:
            columns[str(len(columns))] = part.detach()
            return len(columns) - 1
        if isinstance(part, TopK):
            fields = [walk(x) for x in (part.log_probabilities, part.indices, part.tail)]
            return {"top_k": fields, "classes": part.classes, "temperature": part.temperature}
        if isinstance(part, Mapping):
            kept = {k: v for k, v in part.items() if _has_rows(v, rows)}
            if kept and all(isinstance(key, str) for key in kept):
                return {"mapping": {key: walk(item) for key, item in kept.items()}}
        elif isinstance(part, tuple | list) and part:
            return {"list" if isinstance(part, list) else "tuple": [walk(item) for item in part]}
        elif not isinstance(part, Tensor) and isinstance(getattr(part, "logits", None), Tensor):
            return {"mapping": {"logits": walk(part.logits)}}
        found = f"a tensor of shape {tuple(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
        raise CompressionError(
            f"The teacher's answer has {found} in it, which cannot be stored sample by sample ({rows} samples were "
            "asked for). Stored are tensors with a row for each sample, in tuples, lists and mappings; tap another "
            "layer, or leave the cache out."
        )

    form = walk(value)
    return columns, json.dumps(form)


def _has_rows(value: Any, rows: int) -> bool:
    return value is not None and not (isinstance(value, Tensor) and (value.dim() == 0 or len(value) != rows))


def unpack(columns: Columns, form: str) -> Any:
    """Put a value together again; see `pack`."""

    def build(part: Any) -> Any:
        if isinstance(part, int):
            return columns[str(part)]
        if "top_k" in part:
            logs, indices, tail = (build(x) for x in part["top_k"])
            return TopK(logs, indices, tail, part["classes"], part["temperature"])
        if "mapping" in part:
            return {key: build(item) for key, item in part["mapping"].items()}
        items = [build(item) for item in next(iter(part.values()))]
        return items if "list" in part else tuple(items)

    return build(json.loads(form))


def _check_of(columns: Columns) -> Tensor:
    """A hash of each record's content."""
    total: Tensor | int = 0
    for name in sorted(columns, key=int):
        total = total * 3 + row_hash(columns[name])[:, 0]
    assert isinstance(total, Tensor)
    return total


# -- the store ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Records that lie together, in memory or in a file."""

    keys: Tensor
    check: Tensor
    columns: Columns
    form: str
    path: Path | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Blocks of one kind can be joined."""
        return (self.form, *((n, c.dtype, tuple(c.shape[1:])) for n, c in sorted(self.columns.items())))

    @property
    def size(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.keys, self.check, *self.columns.values()))


def _joined(blocks: Sequence[_Block]) -> _Block:
    names = blocks[0].columns
    columns = {name: torch.cat([b.columns[name] for b in blocks]) for name in names}
    keys, check = (torch.cat([getattr(b, what) for b in blocks]) for what in ("keys", "check"))
    return _Block(keys, check, columns, blocks[0].form)


class AnswerStore:
    """Records by key, in a folder; made for one kind of answer of one teacher.

    Args:
        folder: Where the files are; made if need be. Several stores, in several processes, may use it at once.
        file_bytes: Size at which a file is written; smaller ones are joined with what comes next.
        limit_bytes: The folder does not grow beyond this.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> store, keys = AnswerStore(Path(folder.name)), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
        >>> store.add(keys, torch.tensor([[0.5], [0.25]]))
        >>> store.flush()
        >>> AnswerStore(Path(folder.name)).find(keys.flip(0)).tolist()
        [[0.25], [0.5]]
        >>> store.find(keys + 1) is None
        True
        >>> folder.cleanup()
    """

    def __init__(self, folder: Path, file_bytes: int = 1 << 26, limit_bytes: float = float("inf")) -> None:
        self.folder, self.file_bytes, self.limit_bytes = folder, file_bytes, limit_bytes
        self.writer = uuid.uuid4().hex[:12]
        self.is_full = False
        self.notes: list[str] = []
        """What went wrong with files, for the caller to say."""
        self._blocks: list[_Block] = []
        self._pending: list[_Block] = []
        self._fresh: dict[tuple[int, ...], tuple[int, int]] = {}  # where in `_pending` a key lies
        self._own: dict[tuple[Any, ...], _Block] = {}  # the last file of each kind, while it is small
        self._written = self._waiting = 0
        self._index: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._bad: set[Path] = set()
        self.refresh()

    def __len__(self) -> int:
        return sum(len(block.keys) for block in self._everything())

    def _everything(self) -> list[_Block]:
        return [*self._blocks, *self._pending]

    # -- reading

    def refresh(self) -> None:
        """Look for files that others have written since."""
        there = set(self.folder.glob("*.safetensors")) if self.folder.is_dir() else set()
        known = {block.path: block for block in self._blocks}
        self._blocks = [block for path, block in known.items() if path in there]
        for path in sorted(there - known.keys() - self._bad):
            block = self._open(path)
            if block is not None:
                self._blocks.append(block)
        self._index = None

    def _open(self, path: Path) -> _Block | None:
        try:
            with safe_open(path, "pt") as file:  # tensors are maps of the file, read when they are looked at
                form = file.metadata()["form"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            columns = {n.removeprefix("column."): t for n, t in tensors.items() if n.startswith("column.")}
            return _Block(tensors["keys"], tensors["check"], columns, form, path)
        except FileNotFoundError:  # its writer has joined it with another just now
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            self._bad.add(path)
            self.notes.append(f"{str(path)!r} cannot be read ({type(error).__name__}: {error}): computed again")
            return None

    def _where(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each key the block and the row it lies in, and whether it is there at all."""
        if self._index is None:
            self._index = self._sorted()
        lane, every, numbers, rows = self._index
        if len(lane):
            at = torch.searchsorted(lane, keys[:, 0].contiguous()).clamp(max=len(lane) - 1)
            found = numbers[at].clone(), rows[at].clone(), (every[at] == keys).all(1)
        else:
            found = torch.zeros(len(keys)).long(), torch.zeros(len(keys)).long(), torch.zeros(len(keys)).bool()
        for i in (~found[2]).nonzero().flatten().tolist() if self._fresh else ():
            place = self._fresh.get(tuple(keys[i].tolist()))
            if place is not None:
                found[0][i], found[1][i], found[2][i] = len(self._blocks) + place[0], place[1], True
        return found

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is on disk: the first lanes in order, and for each the whole key, the block and the row."""
        blocks = self._blocks
        every = torch.cat([torch.empty(0, 4).long(), *(b.keys for b in blocks)])
        numbers = torch.cat([torch.empty(0).long(), *(torch.full((len(b.keys),), i) for i, b in enumerate(blocks))])
        rows = torch.cat([torch.empty(0).long(), *(torch.arange(len(b.keys)) for b in blocks)])
        lane, order = every[:, 0].sort(stable=True)
        return lane.contiguous(), every[order], numbers[order], rows[order]

    def has(self, keys: Tensor) -> Tensor:
        """Which keys are there, shape ``(B,)``, bool."""
        return self._where(keys.cpu())[2]

    def find(self, keys: Tensor) -> Any:
        """The value of a batch of keys, on the CPU, or None if one is missing or its record is damaged."""
        blocks = self._everything()
        numbers, rows, there = self._where(keys.cpu())
        if not bool(there.all()) or not len(keys):
            return None
        used = [blocks[i] for i in torch.unique(numbers).tolist()]
        if any(block.kind != used[0].kind for block in used):
            return None
        columns = {n: torch.empty(len(keys), *c.shape[1:], dtype=c.dtype) for n, c in used[0].columns.items()}
        check = torch.empty(len(keys), dtype=torch.int64)
        for number in torch.unique(numbers).tolist():
            mine = numbers == number
            for name, column in blocks[number].columns.items():
                columns[name][mine] = column[rows[mine]]
            check[mine] = blocks[number].check[rows[mine]]
        if not torch.equal(_check_of(columns), check):
            wrong = _check_of(columns) != check
            paths = sorted({str(blocks[i].path or "memory") for i in torch.unique(numbers[wrong]).tolist()})
            self._drop(torch.unique(numbers[wrong]).tolist())
            self.notes.append(f"records in {', '.join(paths)} are damaged (their hash differs): computed again")
            return None
        return unpack(columns, used[0].form)

    def _drop(self, numbers: Sequence[int]) -> None:
        gone = [self._everything()[i] for i in numbers]
        self._bad |= {block.path for block in gone if block.path is not None}
        self._blocks = [b for b in self._blocks if not any(b is g for g in gone)]
        self._pending = [b for b in self._pending if not any(b is g for g in gone)]
        self._fresh = {
            tuple(key): (i, row) for i, b in enumerate(self._pending) for row, key in enumerate(b.keys.tolist())
        }
        self._own = {kind: b for kind, b in self._own.items() if not any(b is g for g in gone)}
        self._index = None

    # -- writing

    def add(self, keys: Tensor, value: Any) -> None:
        """Keep the records of a batch that are not there yet; they can be found at once, and are written by `flush`."""
        keys = keys.cpu()
        columns, form = pack(value, len(keys))
        new = ~self.has(keys)
        for i in new.nonzero().flatten().tolist():  # a batch may hold a sample twice
            new[i] = not bool((keys[:i][new[:i]] == keys[i]).all(1).any())
        if not bool(new.any()) or self.is_full:
            return
        chosen = {name: column.cpu()[new].contiguous() for name, column in columns.items()}
        block = _Block(keys[new], _check_of(chosen), chosen, form)
        if self._size_of_folder() + self._waiting + block.size > self.limit_bytes:
            self.is_full = True
            return
        self._fresh.update({tuple(key): (len(self._pending), row) for row, key in enumerate(block.keys.tolist())})
        self._pending.append(block)
        self._waiting += block.size
        if self._waiting >= self.file_bytes or len(self._fresh) >= _MOST_ROWS:
            self.flush()

    def _size_of_folder(self) -> int:
        return sum(block.size for block in self._blocks)

    def flush(self) -> None:
        """Write what is not on disk yet."""
        by_kind: dict[tuple[Any, ...], list[_Block]] = {}
        for block in self._pending:
            by_kind.setdefault(block.kind, []).append(block)
        for kind, blocks in by_kind.items():
            earlier = self._own.pop(kind, None)
            written = self._write(_joined([earlier, *blocks] if earlier is not None else blocks))
            if earlier is not None:
                assert earlier.path is not None
                self._blocks = [b for b in self._blocks if b is not earlier]
                earlier.path.unlink(missing_ok=True)
            self._blocks.append(written)
            if written.size < self.file_bytes // 2:
                self._own[kind] = written
        self._pending.clear()
        self._fresh.clear()
        self._waiting, self._index = 0, None

    def _write(self, block: _Block) -> _Block:
        self._written += 1
        path = self.folder / f"{self.writer}-{self._written:05d}.safetensors"
        tensors = {"keys": block.keys, "check": block.check, **{f"column.{n}": c for n, c in block.columns.items()}}
        with whole(path) as target:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, {"form": block.form})
        written = self._open(path)
        if written is None:
            raise CompressionError(f"The file {str(path)!r} was just written and is gone or cannot be read again.")
        return written
