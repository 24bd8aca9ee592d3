"""A teacher whose answers are kept on disk: asked once for each sample, not once in each epoch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_compress.distillation.answers import AnswerStore, pack, unpack
from lightning_compress.distillation.hashing import content_digest, sample_keys
from lightning_compress.distillation.source import TeacherRunner
from lightning_compress.distillation.taps import Call, logits_of
from lightning_compress.distillation.teachers import tensors_in_module
from lightning_compress.distillation.top_k import TopK, top_k_of
from lightning_compress.errors import CompressionError
from lightning_compress.nested import map_tensors, tensors_in
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import LossTerm, TapSpec

DType = Literal["as computed", "float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class TeacherCache:
    """Keep the teacher's answers on disk, and ask it only what it was not asked before.

    An answer is found by what was asked (a hash of the sample as the student saw it, augmentation included) and by who
    answered (a hash of every weight, the layers, and the precision). So another teacher, another crop or another
    precision is never answered from the wrong record: it is computed, and stored. Answers are worth storing if samples
    come back: without random augmentation, or with `Replayed`.

    The teacher is asked the samples of a batch that are missing. Its answer to a sample must not depend on the others
    of its batch: now and then a batch that was found is computed as a whole and compared, which finds such teachers,
    and code that was changed.

    Args:
        folder: Where the files are. Several processes and several fits may use one folder at once; delete it whenever
            you like.
        top_k: Store the most likely classes of each place and the mass of all others, for large vocabularies; needs
            terms that compare only probabilities at one fixed temperature (`KD`, `TokenKL`). Default: whole answers.
        dtype: What floats are stored as: ``"as computed"`` loses nothing, ``"float16"`` halves the files.
        limit_gb: The folder does not grow beyond this; what does not fit is computed each time.
        check_every: Every how many batches that were found one is computed again and compared, the first included.

    Raises:
        TypeError: If `folder` is no path.
        ValueError: If a number is out of range.

    Example:
        >>> TeacherCache("answers", top_k=64, dtype="float16").limit_gb
        20.0
    """

    folder: str | os.PathLike[str]
    top_k: int | None = None
    dtype: DType = "as computed"
    limit_gb: float = 20.0
    check_every: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike) or not os.fspath(self.folder):
            raise TypeError(f"folder of TeacherCache is a path; got {self.folder!r}")
        for field in ("top_k", "check_every"):
            value = getattr(self, field)
            allowed = value is None and field == "top_k"
            if not allowed and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{field} of TeacherCache is a whole number of at least 1; got {value!r}")
        if self.dtype not in get_args(DType):
            raise ValueError(f"dtype of TeacherCache is one of {', '.join(get_args(DType))}; got {self.dtype!r}")
        if isinstance(self.limit_gb, bool) or not isinstance(self.limit_gb, int | float) or not self.limit_gb > 0:
            raise ValueError(f"limit_gb of TeacherCache is a number above 0; got {self.limit_gb!r}")


@dataclass(frozen=True)
class Encoding:
    """What is kept of an answer.

    Args:
        top_k: Classes kept, or None for all.
        temperature: Of the softmax, with `top_k`.
        class_dim: Where the classes are, with `top_k`.
        dtype: Of floats; None keeps them.
    """

    top_k: int | None = None
    temperature: float = 1.0
    class_dim: int = -1
    dtype: torch.dtype | None = None

    def __call__(self, spec: TapSpec, answer: Any) -> Any:
        """The answer as the terms get it, now and when it is found again."""
        if self.top_k is not None and spec == TapSpec():
            kept = torch.float32 if self.dtype is None else self.dtype
            return top_k_of(logits_of(answer), self.top_k, self.temperature, self.class_dim, kept)
        if self.dtype is None:
            return answer
        return map_tensors(lambda t: t.to(self.dtype) if t.is_floating_point() else t, answer)


def encoding_of(owner: str, cache: TeacherCache, terms: Sequence[LossTerm]) -> Encoding:
    """What these terms let a cache keep.

    Raises:
        CompressionError: If they need more than the cache is to keep.
    """
    dtype = None if cache.dtype == "as computed" else getattr(torch, cache.dtype)
    if cache.top_k is None:
        return Encoding(dtype=dtype)
    asking = [term for term in terms if TapSpec() in term.taps().teacher]
    unfit = [term.name for term in asking if not getattr(term, "takes_top_k", False)]
    if unfit or not asking:
        raise CompressionError(
            f"{owner}: the cache keeps the {cache.top_k} most likely classes, and {unfit or 'the terms'} compare more "
            "than these probabilities; use KD or TokenKL (without standardize and without a top_k of their own), or "
            "leave top_k of TeacherCache out"
        )
    temperatures: set[Any] = {getattr(term, "temperature") for term in asking}  # noqa: B009 - of SoftTerm
    if len(temperatures) > 1 or any(isinstance(t, Scheduled) for t in temperatures):
        raise CompressionError(
            f"{owner}: with top_k the mass of all other classes is stored at one temperature, and the terms have "
            f"{', '.join(map(str, temperatures))}; give them one number, or leave top_k of TeacherCache out"
        )
    dims = {getattr(term, "class_dim") for term in asking}  # noqa: B009 - of SoftTerm
    if len(dims) > 1:
        raise CompressionError(f"{owner}: the terms disagree about where classes are: class_dim {sorted(dims)}")
    return Encoding(cache.top_k, float(temperatures.pop()), dims.pop(), dtype)


class CachedRunner(TeacherRunner):
    """A `TeacherRunner` that looks for answers first. Until `open` is called it asks the teacher.

    Args:
        runner: Asks the teacher; its taps are taken over.
        cache: Where answers are kept.
        encoding: What is kept of them.
    """

    def __init__(self, runner: TeacherRunner, cache: TeacherCache, encoding: Encoding) -> None:
        self.teacher, self.taps = runner.teacher, runner.taps
        self.cache, self.encoding = cache, encoding
        self.asked = self.found = 0
        """Samples since `restart_counts`."""
        self.stores: dict[tuple[TapSpec, str], AnswerStore] = {}
        self._digest: str | None = None
        self.openings, self._written_to = 0, -1
        self._batches = 0

    @property
    def is_open(self) -> bool:
        """Whether answers are looked for."""
        return self._digest is not None

    def open(self) -> None:
        """The teacher has its weights: look for answers from now on."""
        self.flush()
        self.stores.clear()
        self.openings += 1
        self._digest, self._written_to = content_digest(self.teacher.module), self._writes()

    def _writes(self) -> int:
        """Changes whenever a weight is written to, as by a route of checkpoints that are loaded in place."""
        return sum(t._version for t in tensors_in_module(self.teacher.module))

    def restart_counts(self) -> tuple[int, int]:
        """How many samples were asked for and found since the last time."""
        counts = self.asked, self.found
        self.asked = self.found = 0
        return counts

    def flush(self) -> None:
        """Write what is not on disk yet."""
        for store in self.stores.values():
            store.flush()

    def refresh(self) -> None:
        """Look for what other processes have written since."""
        for store in self.stores.values():
            store.refresh()

    def notes(self) -> list[str]:
        """What went wrong with files since the last time."""
        said = [note for store in self.stores.values() for note in store.notes]
        for store in self.stores.values():
            store.notes.clear()
        return said

    def is_full(self) -> bool:
        """Whether an answer found no room."""
        return any(store.is_full for store in self.stores.values())

    def __call__(
        self, calls: Sequence[Call], specs: Iterable[TapSpec], graph: Iterable[TapSpec] = ()
    ) -> dict[TapSpec, list[Any]]:
        """See `TeacherRunner`; what was found is on the device of the question, and a detached constant."""
        wanted = sorted(set(specs), key=str)
        if not self.is_open or any(True for _ in graph):
            return super().__call__(calls, wanted, graph)
        if self._writes() != self._written_to:
            self.open()  # it is another teacher now
        answers = [self._answer(call, wanted) for call in calls]
        return {spec: [answer[spec] for answer in answers] for spec in wanted}

    def _answer(self, call: Call, specs: Sequence[TapSpec]) -> dict[TapSpec, Any]:
        """What is known of one call, and what is not asked of the teacher."""
        rows, device = _rows(call), next(tensors_in((call.args, call.kwargs)), torch.empty(0)).device
        if not rows:
            return self._live(call, specs)
        with torch.no_grad():
            keys = sample_keys((call.args, call.kwargs)).cpu()
        there = torch.stack([self._store(spec, device).has(keys) for spec in specs]).all(0)
        self.asked += rows
        self.found += int(there.sum())
        answer = self._find(keys, specs, device) if bool(there.all()) else None
        if self._agreed(answer is not None):
            assert answer is not None
            self._compare(call, answer, specs)
            return answer
        everything = bool(there.all()) or self.is_full() or self.teacher.is_sharded
        part = torch.arange(rows) if everything else (~there).nonzero().flatten()
        live = self._keep(keys[part], self._live(_part_of(call, part.to(device)), specs))
        if len(part) == rows:
            return live
        answer = self._find(keys, specs, device)
        # None if a record turned out to be damaged, or there was no room for one.
        return self._keep(keys, self._live(call, specs)) if answer is None else answer

    def _agreed(self, known: bool) -> bool:
        """A sharded teacher runs on all processes or on none."""
        if self.teacher.is_sharded and dist.is_initialized():
            flag = torch.tensor(int(known), device=next(self.teacher.module.parameters()).device)
            dist.all_reduce(flag, dist.ReduceOp.MIN)
            return bool(flag)
        return known

    def _live(self, call: Call, specs: Sequence[TapSpec]) -> dict[TapSpec, Any]:
        return {spec: values[0] for spec, values in super().__call__([call], specs).items()}

    def _store(self, spec: TapSpec, device: torch.device) -> AnswerStore:
        auto = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        kind = f"{spec.module or 'output'} {spec.what} autocast={auto} {self.encoding}"
        if (spec, kind) not in self.stores:
            assert self._digest is not None
            name = hashlib.sha256(f"{self._digest} {kind}".encode()).hexdigest()[:24]
            limit = self.cache.limit_gb * 1e9
            self.stores[spec, kind] = AnswerStore(Path(self.cache.folder) / name, limit_bytes=limit)
        return self.stores[spec, kind]

    def _find(self, keys: Tensor, specs: Sequence[TapSpec], device: torch.device) -> dict[TapSpec, Any] | None:
        found = {}
        for spec in specs:
            answer = self._store(spec, device).find(keys)
            if answer is None:
                return None
            found[spec] = map_tensors(lambda t: t.to(device, non_blocking=True), answer)
        return found

    def _keep(self, keys: Tensor, answers: dict[TapSpec, Any]) -> dict[TapSpec, Any]:
        """Store answers; return them as they will be found."""
        kept = {}
        with torch.no_grad():
            for spec, answer in answers.items():
                encoded = self.encoding(spec, answer)
                kept[spec] = unpack(*pack(encoded, len(keys)))
                self._store(spec, next(tensors_in(answer)).device).add(keys, encoded)
        return kept

    def _compare(self, call: Call, found: dict[TapSpec, Any], specs: Sequence[TapSpec]) -> None:
        """Ask the teacher a batch that was found, now and then."""
        self._batches += 1
        if self._batches % self.cache.check_every == 1 or self.cache.check_every == 1:
            for spec, answer in self._live(call, specs).items():
                self._equal(spec, unpack(*pack(self.encoding(spec, answer), _rows(call))), found[spec])

    def _equal(self, spec: TapSpec, live: Any, stored: Any) -> None:
        for a, b in zip(_floats(live), _floats(stored), strict=True):
            tolerance = 0.05 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
            finite = a.isfinite() & b.isfinite()
            error = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
            if error > tolerance * (1 + float(a[finite].abs().max() if bool(finite.any()) else 0)):
                raise CompressionError(
                    f"The teacher's {spec.module or 'output'!r} differs by {error:.3g} from what the cache "
                    f"{os.fspath(self.cache.folder)!r} holds for the same samples. Its answer to a sample depends on "
                    "what else is in the batch, or on random numbers, so it cannot be stored: leave the cache out. If "
                    "its code was changed since: delete the folder."
                )


def _rows(call: Call) -> int:
    first = next((t for t in tensors_in((call.args, call.kwargs)) if t.dim() > 0), None)
    return 1 if first is None else len(first)  # without a batch `sample_keys` says what is wrong


def _part_of(call: Call, rows: Tensor) -> Call:
    """The same question for some samples of the batch."""
    size = _rows(call)
    chosen = map_tensors(
        lambda t: t[rows.to(t.device)] if t.dim() > 0 and len(t) == size else t, (call.args, call.kwargs)
    )
    return Call(chosen[0], chosen[1], None)


def _floats(value: Any) -> list[Tensor]:
    if isinstance(value, TopK):
        return [value.log_probabilities.float()]  # which of two equally likely tokens comes first may change
    return [t for t in tensors_in(value) if t.is_floating_point()]
