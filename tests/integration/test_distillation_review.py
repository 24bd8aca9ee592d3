"""Knowledge review and contrastive distillation with a memory: against their formulas, and in fits."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import fits
import lightning as L
import numpy as np
import pytest
import resuming
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Distillation
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, tiny_data, tiny_loader
from lightning_compress.distillation.memory import MemoryHead, memory_nce_loss, numbers_of
from lightning_compress.distillation.review import ReviewFusion, hcl_loss

X = torch.zeros(2, 1, 8, 8)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(module: L.LightningModule, *callbacks: L.Callback, loader: Any = None, **settings: Any) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(
        callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **settings}
    )
    trainer.fit(module, loader or tiny_loader())
    return trainer


def net(seed: int = 0, cls: Any = TinyNet, **hparams: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(**hparams)


# -- review ------------------------------------------------------------------------------------------------------------


def averaged(x: Any, size: int) -> Any:
    """Average pooling to size x size places, written as loops."""
    n, c, h, w = x.shape
    out = np.zeros((n, c, size, size))
    for i, j in np.ndindex(size, size):
        rows = slice(i * h // size, math.ceil((i + 1) * h / size))
        columns = slice(j * w // size, math.ceil((j + 1) * w / size))
        out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


@pytest.mark.parametrize("size", [8, 4, 3, 2, 1])
def test_hierarchical_loss_is_its_formula(size: int) -> None:
    s, t = draw(3, 5, size, size, seed=1), draw(3, 5, size, size, seed=2)
    weights, total = [1.0], float(((s - t) ** 2).mean())
    for level in (4, 2, 1):
        if level < size:
            weights.append(weights[-1] / 2)
            total += weights[-1] * ((averaged(s.numpy(), level) - averaged(t.numpy(), level)) ** 2).mean()
    assert hcl_loss(s, t).item() == pytest.approx(total / sum(weights), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: hcl_loss(x, t), s.requires_grad_())
    assert hcl_loss(t, t).item() == 0


def fused_by_hand(fusion: Any, features: list[Tensor], sizes: Any) -> list[Tensor]:
    """The published fusion with plain convolutions, in eval mode."""

    def norm(x: Tensor, layer: Any) -> Tensor:
        shape = (1, -1, 1, 1)
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        return (x - layer.running_mean.view(shape)) * scale.view(shape) + layer.bias.view(shape)

    out: list[Tensor] = []
    below = None
    for i in (1, 0):
        layer = fusion.layers[str(i)]
        x = norm(F.conv2d(features[i], layer.reduce.weight[..., None, None]), layer.reduce_norm)
        if below is not None:
            factor = x.shape[-1] // below.shape[-1]
            below = below.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            both = torch.cat([x, below], 1)
            shares = torch.sigmoid(F.conv2d(both, layer.attention.weight, layer.attention.bias))
            x = x * shares[:, 0:1] + below * shares[:, 1:2]
        below = x
        y = x.repeat_interleave(sizes[i][0] // x.shape[2], 2).repeat_interleave(sizes[i][1] // x.shape[3], 3)
        out.insert(0, norm(F.conv2d(y, layer.widen.weight, padding=1), layer.widen_norm))
    return out


def test_fusion_is_the_published_one() -> None:
    fusion = ReviewFusion([(3, 5), (6, 7)], width=4, dims=2).double()
    features = [draw(2, 3, 8, 8, seed=1), draw(2, 6, 4, 4, seed=2)]
    fusion([5 * x + 1 for x in features], [(8, 8), (8, 8)])  # statistics that are not those of the start
    fusion.eval()
    found = fusion(features, [(8, 8), (8, 8)])
    for a, b in zip(found, fused_by_hand(fusion, features, [(8, 8), (8, 8)]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert [x.shape[1] for x in found] == [5, 7]
    one = ReviewFusion([(3, 5), (6, 7)], width=4, dims=1)
    assert [tuple(x.shape) for x in one([torch.zeros(2, 3, 9), torch.zeros(2, 6, 4)], [(9,), (5,)])] == [
        (2, 5, 9), (2, 7, 5),
    ]  # fmt: skip


class ByHand(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        mine, theirs = [self.net[:3](x)], [self.taught.net[:3](x)]
        mine.append(self.net[3:7](mine[0]))
        theirs.append(self.taught.net[3:7](theirs[0]))
        merged = self.owned(mine, [t.shape[2:] for t in theirs])
        loss = sum((hcl_loss(m, t) for m, t in zip(merged, theirs, strict=True)), torch.zeros(()))
        return F.cross_entropy(self.net[7:](mine[1]), y) + 0.5 * loss


class Owned(L.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.module = copy.deepcopy(pl_module._lc_Distillation_review)


def test_review_equals_the_step_written_by_hand() -> None:
    ours, owned, taught = net(width=12), Owned(), net(9, width=24)
    review = lc.Review(["net.2", "net.6"], 0.5, width=8)
    train(ours, Distillation(copy.deepcopy(taught), losses=[review], example_inputs=X), owned)
    wanted = net(cls=ByHand, width=12)
    wanted.__dict__["taught"] = taught.eval().requires_grad_(False)
    wanted.owned = owned.module
    train(wanted)
    for name, value in ours.net.state_dict().items():
        torch.testing.assert_close(value, wanted.net.state_dict()[name], rtol=1e-5, atol=1e-6)
    plain = net(width=12)
    train(plain)
    assert not torch.allclose(plain.net[0].weight, ours.net[0].weight)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_review_pairs_itself_and_follows_cuts(precision: Any) -> None:
    module, review = net(width=16), lc.Review(weight=1.0)
    cuts = [ChannelPruning(keep_macs=0.5, schedule=lc.Schedule(begin=3, end=4, every=4), example_inputs=X)]
    if precision == "bf16-true":  # pruning has no example of that type
        cuts = []
    callback = Distillation(net(9, width=24), losses=[review], example_inputs=X)
    trainer = train(module, callback, *cuts, precision=precision)
    assert [s.module for s, _ in review.pairs] == ["net.5", "net.6"]
    assert (module.net[3].out_channels < 16) == bool(cuts)
    reduce = module._lc_Distillation_review.layers["0"].reduce
    assert reduce.in_features == reduce.weight.shape[1] == module.net[3].out_channels
    assert math.isfinite(float(trainer.callback_metrics["Distillation/review"]))


def test_review_of_weight_0_is_no_callback() -> None:
    plain, ours = net(dropout=0.3), net(dropout=0.3)
    train(plain)
    review = lc.Review(["net.2", "net.5"], weight=0.0)
    train(ours, Distillation(net(9, width=24), losses=[review], example_inputs=X))
    assert manifest.equal(dict(plain.net.state_dict()), dict(ours.net.state_dict()))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_loss_is_its_formula() -> None:
    p, n = draw(4, seed=1).exp(), draw(4, 6, seed=2).exp()
    total = 0.0
    for i in range(4):
        chance = 6 * (1 / 50)
        total -= math.log(p[i] / (p[i] + chance)) + sum(math.log(chance / (x + chance)) for x in n[i])
    assert memory_nce_loss(p, n, 50).item() == pytest.approx(total / 4, rel=1e-5)
    assert torch.autograd.gradcheck(lambda a, b: memory_nce_loss(a, b, 50), (p.requires_grad_(), n.requires_grad_()))


def test_memory_head_is_the_published_procedure() -> None:
    torch.manual_seed(0)
    head = MemoryHead(3, 5, size=4, samples=10, negatives=3, temperature=0.5, momentum=0.25).double()
    before = copy.deepcopy(head.state_dict())
    features, index = (draw(2, 3, seed=1), draw(2, 5, seed=2)), torch.tensor([7, 2])
    others: list[Tensor] = []
    inner = head._draw
    head._draw = lambda batch: others.append(inner(batch)) or others[-1]  # type: ignore[func-returns-value, method-assign]
    loss = head((*features, index))
    unit = [F.normalize(F.linear(x, before[f"{w}.weight"], before[f"{w}.bias"]), dim=1)
            for x, w in zip(features, ("student", "teacher"), strict=True)]  # fmt: skip
    total = 0.0
    for v, memory in zip(unit, (before["teacher_memory"], before["student_memory"]), strict=True):
        scores = [[math.exp(float(v[i] @ memory[j]) / 0.5) for j in (index[i], *others[0][i])] for i in range(2)]
        z = float(np.mean(scores)) * 10
        table = torch.tensor(scores, dtype=torch.float64) / z
        total += memory_nce_loss(table[:, 0], table[:, 1:], 10).item()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    for name, v in zip(("student_memory", "teacher_memory"), unit, strict=True):
        wanted = before[name].clone()
        wanted[index] = F.normalize(0.25 * wanted[index] + 0.75 * v, dim=1)
        torch.testing.assert_close(head.state_dict()[name], wanted)
    normalizers = head.normalizers.clone()
    head((*features, index))
    assert torch.equal(head.normalizers, normalizers)  # fixed in the first step
    assert not torch.equal(others[0], others[1])
    head((features[0][[0, 1, 1]], features[1][[0, 1, 1]], torch.tensor([4, 4, 4])))  # the last one is remembered
    torch.testing.assert_close(
        head.student_memory[4], F.normalize(0.25 * before["student_memory"][4] + 0.75 * unit[0][1], dim=0)
    )


class Numbered(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


def numbered() -> TensorDataset:
    data = tiny_data()
    return TensorDataset(*data.tensors, torch.arange(len(data)))


def remembering(**settings: Any) -> Distillation:
    crd = lc.CRD("net.7", 0.8, size=8, **{"samples": 64, "negatives": 16, **settings})
    return Distillation(net(9, width=24), losses=[crd], example_inputs=X)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_memory_in_a_fit(precision: Any, tmp_path: Path) -> None:
    module = net(cls=Numbered, width=12)
    trainer = train(module, remembering(), loader=DataLoader(numbered(), 16, shuffle=True), precision=precision)
    head = module._lc_Distillation_crd.layers["0"]
    torch.testing.assert_close(head.student_memory.norm(dim=1), torch.ones(64), rtol=1e-2, atol=0)  # each was seen
    assert int(head.drawn[1]) == 8
    assert math.isfinite(float(trainer.callback_metrics["Distillation/crd"]))
    lc.export(module, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 4 * sum(p.numel() for p in module.net.parameters()) + 4000


def test_memory_of_weight_0_is_no_callback_and_draws_disturb_nobody() -> None:
    loader = DataLoader(numbered(), 16)
    plain, ours, other = (net(cls=Numbered, dropout=0.3) for _ in range(3))
    train(plain, loader=loader)
    callback = remembering()
    callback.losses[0].weight = 0.0
    train(ours, callback, loader=loader)
    assert manifest.equal(dict(plain.net.state_dict()), dict(ours.net.state_dict()))
    seen: list[Tensor] = []

    class Draws(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(torch.get_rng_state())

    train(net(cls=Numbered, dropout=0.3), Draws(), loader=loader)
    train(other, remembering(), Draws(), loader=loader)
    assert all(torch.equal(a, b) for a, b in zip(seen[:8], seen[8:], strict=True))


def test_memory_resumed_is_straight(tmp_path: Path) -> None:
    class Student(resuming.Student):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:2], batch_idx)

    def batches() -> ResumableLoader:
        return ResumableLoader(numbered(), 16, seed=3)

    straight, _ = resuming.fit([remembering(), resuming.every_step(tmp_path)], module=Student(), loader=batches())
    for step in (1, 6):
        file = tmp_path / f"step={step}.ckpt"
        resumed, _ = resuming.fit([remembering()], module=Student(), resume=file, loader=batches())
        assert manifest.equal(dict(straight.state_dict()), dict(resumed.state_dict())), step


@pytest.mark.parametrize(
    ("batch", "where", "says"),
    [
        ((X, X), 2, r"nothing at 2 of the batch \(a tuple of 2\).*Let the dataset return"),
        ({"x": X}, "number", r"nothing at 'number' of the batch \(keys"),
        ((X, X, torch.zeros(2)), 2, r"torch.float32, and one whole number for each of the 2"),
        ((X, X, torch.tensor([1, 2, 3])), 2, "one whole number for each of the 2"),
        ((X, X, "a"), 2, "is a str, and one"),
        ((X, X, torch.tensor([1, 64])), 2, r"from 1 to 64, and the memory has room for 0 to 63: samples="),
        ((X, X, torch.tensor([-1, 3])), 2, r"from -1 to 3"),
    ],
)
def test_numbers_that_are_none(batch: Any, where: Any, says: str) -> None:
    with pytest.raises(lc.CompressionError, match=says):
        numbers_of(batch, where, 64, 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lc.CRD("a", samples=0), "samples"), (lambda: lc.CRD("a", samples=9, negatives=0), "negatives"),
        (lambda: lc.CRD("a", samples=9, momentum=1.0), r"lies in \[0, 1\)"), (lambda: lc.Review("a", width=0), "width"),
        (lambda: lc.Review("a", weight=-1), "weight"),
    ],
)  # fmt: skip
def test_arguments(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("layers", [["net.5", "net.7"], ["net.9"]])
def test_review_of_vectors_is_refused(layers: list[str]) -> None:
    with pytest.raises(lc.CompressionError, match="compare vectors by Hint or CRD"):
        train(net(), Distillation(net(9, width=24), losses=[lc.Review(layers)], example_inputs=X))
    with pytest.raises(lc.CompressionError, match="maps of one shape, with places"):
        hcl_loss(torch.zeros(2, 3), torch.zeros(2, 3))
