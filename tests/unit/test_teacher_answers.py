"""Stored answers: the divergence of what was kept is that of the whole, and files of several writers are one store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import softmax
from torch import Tensor

import lightning_compress as lc
from lightning_compress.distillation.answers import AnswerStore, pack, unpack
from lightning_compress.distillation.losses import kd_loss
from lightning_compress.distillation.tokens import token_kl_loss
from lightning_compress.distillation.top_k import top_k_kl_loss, top_k_of
from lightning_compress.errors import CompressionError


def draw(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- top k -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_classes_are_the_exact_divergence_and_its_gradient(temperature: float) -> None:
    s, t = draw(6, 7, seed=1).requires_grad_(), draw(6, 7, seed=2)
    exact = kd_loss(s, t, temperature)
    kept = top_k_kl_loss(s, top_k_of(t, 7, temperature, dtype=torch.float64))
    torch.testing.assert_close(kept, exact, rtol=1e-12, atol=0)
    wanted, found = (torch.autograd.grad(loss, s)[0] for loss in (exact, kept))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(top_k_kl_loss(s, top_k_of(t, 99, temperature)), top_k_kl_loss(s, top_k_of(t, 7, temperature)))


def test_some_classes_are_summed_as_written_down() -> None:
    s, t = draw(5, 9, seed=3), draw(5, 9, seed=4)
    total = 0.0
    for row, other in zip(s.numpy(), t.numpy(), strict=True):
        q, p = softmax(row / 2), softmax(other / 2)
        likely = (-p).argsort()[:3]
        events = [*((p[i], q[i]) for i in likely), (1 - p[likely].sum(), 1 - q[likely].sum())]
        total += sum(a * torch.tensor(a / b).log().item() for a, b in events)
    kept = top_k_kl_loss(s, top_k_of(t, 3, 2.0, dtype=torch.float64))
    assert kept.item() == pytest.approx(4 * total / 5, rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: top_k_kl_loss(x, top_k_of(t, 3, 2.0, dtype=torch.float64)), s.requires_grad_()
    )


def test_more_classes_lose_less() -> None:
    s, t = draw(8, 12, seed=5), draw(8, 12, seed=6)
    values = [top_k_kl_loss(s, top_k_of(t, k, dtype=torch.float64)).item() for k in range(1, 13)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(kd_loss(s, t, 1.0).item())
    assert top_k_kl_loss(t, top_k_of(t, 4, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_stays_a_distribution(dtype: torch.dtype, tolerance: float) -> None:
    s, t = draw(64, 1000, seed=7), draw(64, 1000, seed=8, scale=3.0)
    kept, whole = top_k_of(t, 50, dtype=dtype), top_k_of(t, 50, dtype=torch.float64)
    assert kept.log_probabilities.dtype == kept.tail.dtype == dtype
    assert kept.indices.dtype is torch.int16
    torch.testing.assert_close(kept.events()[0].exp().sum(-1), torch.ones(64), rtol=1e-6, atol=0)
    assert top_k_kl_loss(s, kept).item() == pytest.approx(top_k_kl_loss(s, whole).item(), rel=tolerance)
    assert top_k_of(draw(1, 40_000, seed=1), 3).indices.dtype is torch.int32


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits_give_finite_losses_and_gradients(k: int, dtype: torch.dtype) -> None:
    t = torch.tensor([[1e4, -1e4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [80.0, 79.0, -80.0, -80.0]])
    s = torch.tensor([[-50.0, 50.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0], [0.0, 0.0, 50.0, 0.0]], requires_grad=True)
    loss = top_k_kl_loss(s, top_k_of(t, k, dtype=dtype))
    (gradient,) = torch.autograd.grad(loss, s)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_places_masks_chunks_and_dimensions() -> None:
    s, t = draw(2, 5, 11, seed=9).float(), draw(2, 5, 11, seed=10).float()
    mask = torch.tensor([[True, False, True, True, False], [True, True, False, False, False]])
    top = top_k_of(t, 4, 2.0)
    wanted = token_kl_loss(s, t, mask, 2.0, top_k=4)
    torch.testing.assert_close(top_k_kl_loss(s, top, mask), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(top_k_kl_loss(s, top, mask, chunk=3), wanted, rtol=1e-5, atol=0)
    assert top_k_kl_loss(s, top, mask & False).item() == 0
    moved = top_k_of(t.movedim(-1, 1), 4, 2.0, class_dim=1)
    torch.testing.assert_close(top_k_kl_loss(s.movedim(-1, 1), moved, mask, class_dim=1), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        top_k_kl_loss(s[:, 1:], top[:, 1:]), token_kl_loss(s[:, 1:], t[:, 1:], None, 2.0, 4), rtol=1e-5, atol=0
    )
    with pytest.raises(CompressionError, match="different shapes"):
        top_k_kl_loss(s[..., :9], top)


def test_terms_take_what_was_kept() -> None:
    from lightning_compress.distillation.losses import LOGITS
    from lightning_compress.distillation.tokens import ARGUMENTS

    s, t = draw(2, 5, 11, seed=11).float(), draw(2, 5, 11, seed=12).float()
    labels = torch.tensor([[-100, 1, 2, 3, -100], [1, 1, 1, 1, 1]])
    student: Any = {LOGITS: [s], ARGUMENTS: [((), {"labels": labels})]}
    for chunk in (None, 2):
        kept = lc.TokenKL(2.0, chunk=chunk).compute(student, {LOGITS: [top_k_of(t, 11, 2.0)]}, 0)
        torch.testing.assert_close(kept, lc.TokenKL(2.0).compute(student, {LOGITS: [t]}, 0), rtol=1e-5, atol=0)
    rows: Any = {LOGITS: [s[0]]}
    kept = lc.KD(2.0).compute(rows, {LOGITS: [top_k_of(t[0], 11, 2.0)]}, 0)
    torch.testing.assert_close(kept, kd_loss(s[0], t[0], 2.0), rtol=1e-5, atol=0)
    assert not lc.KD(standardize=True).takes_top_k
    assert not lc.TokenKL(top_k=3).takes_top_k
    with pytest.raises(CompressionError, match="No logits in a TopK"):
        lc.DIST().compute(rows, {LOGITS: [top_k_of(t[0], 3)]}, 0)


# -- values and files --------------------------------------------------------------------------------------------------


def keys(*numbers: int) -> Tensor:
    return torch.tensor([[n, n + 1, -n, 7] for n in numbers])


def rows(*numbers: float) -> Tensor:
    return torch.tensor([[n, 2 * n] for n in numbers])


@pytest.mark.parametrize(
    "value",
    [
        rows(1, 2), (rows(1, 2), [rows(3, 4)]), {"a": rows(1, 2), "b": (rows(5, 6).half(),)},
        top_k_of(rows(1, 2), 1), {"logits": rows(1, 2), "loss": torch.tensor(1.0), "none": None},
    ],
)  # fmt: skip
def test_values_come_back_as_they_were(value: Any) -> None:
    found = unpack(*pack(value, 2))
    if isinstance(value, dict) and "loss" in value:
        value = {"logits": value["logits"]}
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    "value", [torch.tensor(1.0), (rows(1, 2), torch.zeros(3)), "text", {"loss": torch.tensor(1.0)}]
)
def test_values_without_a_row_for_each_sample_are_refused(value: Any) -> None:
    with pytest.raises(CompressionError, match="cannot be stored sample by sample"):
        pack(value, 2)


def test_writers_share_a_folder(tmp_path: Path) -> None:
    first, second = AnswerStore(tmp_path), AnswerStore(tmp_path)
    first.add(keys(1, 2), rows(1, 2))
    second.add(keys(3, 2), rows(3, 2))  # both know 2
    assert second.find(keys(1)) is None
    assert torch.equal(first.find(keys(2, 1)), rows(2, 1))  # before it is written
    first.flush()
    second.flush()
    second.refresh()
    assert torch.equal(second.find(keys(3, 1, 2, 1)), rows(3, 1, 2, 1))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    third = AnswerStore(tmp_path)
    assert third.has(keys(1, 2, 3, 4)).tolist() == [True, True, True, False]
    third.add(keys(1), rows(9))  # known: kept as it was
    third.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_small_files_are_joined_and_large_ones_left(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, file_bytes=1000)
    for number in range(60):
        store.add(keys(2 * number, 2 * number + 1), rows(2 * number, 2 * number + 1))
        store.flush()
    files = list(tmp_path.glob("*.safetensors"))
    assert 2 <= len(files) <= 12
    assert torch.equal(AnswerStore(tmp_path).find(keys(*range(120))), rows(*range(120)))
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]


def test_a_batch_may_hold_a_sample_twice_and_shapes_may_differ(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.add(keys(5, 5, 6), rows(5, 5, 6))
    store.add(keys(7), torch.ones(1, 3, 2))
    store.flush()
    store = AnswerStore(tmp_path)
    assert len(store) == 3
    assert torch.equal(store.find(keys(7)), torch.ones(1, 3, 2))
    assert torch.equal(store.find(keys(6, 5)), rows(6, 5))
    assert store.find(keys(5, 7)) is None  # they make no batch


def test_a_file_that_its_writer_joined_with_another_is_no_error(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.add(keys(1), rows(1))
    store.flush()
    reader = AnswerStore(tmp_path)
    store.add(keys(2), rows(2))
    store.flush()  # the first file is gone
    assert torch.equal(reader.find(keys(1)), rows(1))
    reader.refresh()
    assert torch.equal(reader.find(keys(1, 2)), rows(1, 2))
    assert not reader.notes
