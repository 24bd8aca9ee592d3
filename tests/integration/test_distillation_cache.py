"""The teacher's answers on disk: the same loss as a live teacher, and never a wrong answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import fits
import lightning as L
import numpy as np
import pytest
import resuming
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import Distillation
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, tiny_data, tiny_loader
from lightning_compress.distillation.hashing import content_digest, sample_keys

X = torch.zeros(2, 1, 8, 8)


class Counted(TinyNet):
    """A teacher that counts the samples it was asked."""

    asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return super().forward(x)


def teacher(seed: int = 5, cls: type[TinyNet] = Counted) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(width=24)


def student() -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyNet(width=12)


class Shares(L.Callback):
    """What share of each batch was found, and each loss of the term."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        found = trainer.callback_metrics
        if "Distillation/cached" in found:
            self.shares.append(float(found["Distillation/cached"]))
        self.losses += [float(v) for k, v in found.items() if k.startswith("Distillation/") and "cached" not in k][:1]


def train(folder: Any, taught: Any, loader: Any = None, **settings: Any) -> tuple[TinyNet, Shares]:
    L.seed_everything(3, verbose=False)
    losses, example = settings.pop("losses", None), settings.pop("example_inputs", None)
    module, shares = student(), Shares()
    callback = Distillation(taught, losses=losses, example_inputs=example, cache=folder)
    options = {**fits.QUIET, "max_epochs": 3, "num_sanity_val_steps": 0, **settings}
    trainer = L.Trainer(callbacks=[callback, shares], **options)
    trainer.fit(module, loader or DataLoader(tiny_data(), 16, shuffle=True))
    return module, shares


def features() -> list[lc.LossTerm]:
    return [lc.KD(2.0), lc.Hint("net.5", 10.0), lc.AT("net.2", 10.0)]


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=tolerance, atol=tolerance)


# -- equal to a live teacher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [lambda: [lc.KD(2.0)], features], ids=["answers", "features"])
def test_a_teacher_is_asked_once_and_the_loss_is_that_of_a_live_one(losses: Any, tmp_path: Path) -> None:
    live, taught = student(), teacher()
    live, live_shares = train(None, teacher(), losses=losses(), example_inputs=X)
    cached, shares = train(tmp_path, taught, losses=losses(), example_inputs=X)
    assert shares.shares == [0.0] * 4 + [1.0] * 8
    asked = taught.asked - (2 if len(losses()) > 1 else 0)  # the example by which projectors are sized
    assert asked == 64 + 16  # and one batch to compare
    torch.testing.assert_close(shares.losses, live_shares.losses, rtol=1e-5, atol=1e-6)
    close(cached, live)
    again = teacher()
    second, shares = train(tmp_path, again, losses=losses(), example_inputs=X)
    assert shares.shares == [1.0] * 12
    assert again.asked <= 16 + 2
    close(second, live)


def test_half_precision_loses_what_it_has_to(tmp_path: Path) -> None:
    cache = lc.TeacherCache(tmp_path, dtype="float16")
    live, live_shares = train(None, teacher())
    cached, shares = train(cache, teacher())
    torch.testing.assert_close(shares.losses, live_shares.losses, rtol=2e-2, atol=1e-3)
    close(cached, live, 2e-2)
    dtypes = {str(t.dtype) for file in tmp_path.rglob("*.safetensors") for t in columns(file)}
    assert dtypes == {"torch.float16"}


def columns(file: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    return [t for name, t in load_file(file).items() if name.startswith("column")]


def test_all_classes_of_top_k_are_the_whole_answer(tmp_path: Path) -> None:
    live, live_shares = train(None, teacher(), losses=[lc.KD(2.0)])
    cached, shares = train(lc.TeacherCache(tmp_path, top_k=4), teacher(), losses=[lc.KD(2.0)])
    torch.testing.assert_close(shares.losses, live_shares.losses, rtol=1e-4, atol=1e-6)
    close(cached, live)
    _, fewer = train(lc.TeacherCache(tmp_path, top_k=2), teacher(), losses=[lc.KD(2.0)])
    assert fewer.losses[0] < live_shares.losses[0]  # merging classes is a lower bound


class Words(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 50)

    def forward(self, ids: Tensor, labels: Any = None) -> dict[str, Any]:
        logits = self.head(self.embed(ids).cumsum(1))
        return {"logits": logits, "loss": None if labels is None else logits.mean()}


class Language(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Words(6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.net(batch, labels=batch)
        return nn.functional.cross_entropy(found["logits"][:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_language_models_keep_the_likely_tokens_of_texts_of_any_length(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 50, (4, length), generator=generator) for length in (5, 9, 5, 7)]
    found = []
    for cache in (None, lc.TeacherCache(tmp_path, top_k=50), lc.TeacherCache(tmp_path, top_k=8, dtype="float16")):
        torch.manual_seed(0)
        module, taught = Language(), Words(24)
        callback, shares = Distillation(taught, losses=[lc.TokenKL(2.0)], cache=cache), Shares()
        loader: Any = DataLoader(texts, batch_size=None)  # type: ignore[arg-type]
        L.Trainer(callbacks=[callback, shares], **{**fits.QUIET, "max_epochs": 2}).fit(module, loader)
        found.append((module, shares))
    assert found[1][1].shares == [0.0] * 4 + [1.0] * 4
    close(found[1][0], found[0][0])
    assert all(a <= b * 1.001 for a, b in zip(found[2][1].losses[:1], found[0][1].losses[:1], strict=True))
    kept = {c.dtype for file in tmp_path.rglob("*.safetensors") for c in columns(file)}
    assert kept == {torch.float32, torch.float16, torch.int16}


# -- random augmentation -----------------------------------------------------------------------------------------------


class Augmented(Dataset[Any]):
    """Noise and flips from all three global generators."""

    classes = ("a", "b", "c", "d")

    def __init__(self) -> None:
        self.data = tiny_data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        x = x + 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        return (x.flip(-1) if random.random() < 0.5 else x), y


def test_under_random_augmentation_nothing_is_found_and_nothing_is_wrong(tmp_path: Path) -> None:
    live, live_shares = train(None, teacher(), DataLoader(Augmented(), 16, shuffle=True))
    with pytest.warns(UserWarning, match=r"the cache knew none: .*Replayed"):
        cached, shares = train(tmp_path, teacher(), DataLoader(Augmented(), 16, shuffle=True))
    assert set(shares.shares) == {0.0}
    assert shares.losses == live_shares.losses
    assert manifest.equal(dict(live.state_dict()), dict(cached.state_dict()))


@pytest.mark.parametrize(("variants", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_replayed_augmentation_is_found(variants: int, workers: int, tmp_path: Path) -> None:
    def loader() -> Any:
        data: Any = lc.Replayed(Augmented(), variants)
        return DataLoader(data, 16, shuffle=True, num_workers=workers)

    live, live_shares = train(None, teacher(), loader(), max_epochs=5)
    taught = teacher()
    cached, shares = train(tmp_path, taught, loader(), max_epochs=5)
    if variants == 1:
        assert shares.shares == [0.0] * 4 + [1.0] * 16
    else:
        files = list(tmp_path.rglob("*.safetensors"))
        assert 64 < sum(len(columns(file)[0]) for file in files) <= 128
        assert taught.asked == sum(len(columns(file)[0]) for file in files) + 16 * (1.0 in shares.shares)
    torch.testing.assert_close(shares.losses, live_shares.losses, rtol=1e-5, atol=1e-6)
    close(cached, live)


def test_replayed_looks_alike_each_time_and_disturbs_nobody() -> None:
    data = lc.Replayed(Augmented(), seed=1)
    L.seed_everything(0, verbose=False)
    wanted = torch.rand(1), random.random(), np.random.rand()
    L.seed_everything(0, verbose=False)
    first = [data[i][0] for i in range(8)]
    assert (torch.rand(1), random.random(), np.random.rand()) == wanted
    assert all(torch.equal(data[i][0], x) for i, x in enumerate(first))
    assert not torch.equal(first[0] - data.data[0][0], first[1] - data.data[1][0])
    assert not torch.equal(first[0], lc.Replayed(Augmented(), seed=2)[0][0])
    assert (len(data), data.classes) == (64, Augmented.classes)
    looks = {tuple(lc.Replayed(Augmented(), 3)[0][0].flatten().tolist()) for _ in range(40)}
    assert len(looks) == 3
    for make, kind in [(lambda: lc.Replayed(iter([])), TypeError), (lambda: lc.Replayed(Augmented(), 0), ValueError)]:
        with pytest.raises(kind):
            make()


# -- never a wrong answer ----------------------------------------------------------------------------------------------


def test_another_teacher_finds_nothing_of_the_first(tmp_path: Path) -> None:
    train(tmp_path, teacher())
    other = teacher()
    with torch.no_grad():
        other.net[3].weight[0, 0, 0, 0] += 1e-3  # which the sampled fingerprint may miss
    live, _ = train(None, other)
    cached, shares = train(tmp_path, other, max_epochs=1)
    assert set(shares.shares) == {0.0}
    live, _ = train(None, other, max_epochs=1)
    assert manifest.equal(dict(live.state_dict()), dict(cached.state_dict()))


def test_a_teacher_that_changes_in_mid_fit_is_asked_anew(tmp_path: Path) -> None:
    class Route(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                taught.load_state_dict(teacher(6).state_dict())

    losses = []
    for cache in (None, tmp_path):
        L.seed_everything(3, verbose=False)
        taught, shares = teacher(), Shares()
        trainer = L.Trainer(
            callbacks=[Route(), Distillation(taught, cache=cache), shares], **{**fits.QUIET, "max_epochs": 3}
        )
        trainer.fit(student(), tiny_loader())
        losses.append(shares.losses)
    assert shares.shares == [0.0] * 8 + [1.0] * 4
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_another_precision_finds_nothing_of_the_first(tmp_path: Path) -> None:
    train(tmp_path, teacher(), max_epochs=1)
    _, shares = train(tmp_path, teacher(), max_epochs=1, precision="bf16-mixed")
    assert set(shares.shares) == {0.0}
    _, shares = train(tmp_path, teacher(), max_epochs=1, precision="bf16-mixed")
    assert set(shares.shares) == {1.0}


@pytest.mark.parametrize("harm", ["value", "cut", "empty"])
def test_a_damaged_file_is_noticed_and_computed_again(harm: str, tmp_path: Path) -> None:
    live, _ = train(tmp_path, teacher())
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40  # within the last column, or the hashes: both have to be noticed
    file.write_bytes({"value": bytes(data), "cut": bytes(data[: len(data) // 2]), "empty": b""}[harm])
    taught = teacher()
    with pytest.warns(UserWarning, match="computed again"):
        again, _ = train(tmp_path, taught)
    assert taught.asked >= 64
    close(again, live)


class Mixing(Counted):
    """A teacher whose answer to a sample depends on the others of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        answer = super().forward(x)
        return answer + 10 * x.mean()


def test_a_teacher_that_mixes_its_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lc.CompressionError, match=r"depends on what else is in the batch.*leave the cache out"):
        train(tmp_path, teacher(cls=Mixing))


def test_keys_see_everything_that_is_asked() -> None:
    x = torch.randn(3, 2, 5)
    base = sample_keys(((x,), {"scale": 1.0}))
    assert torch.equal(base, sample_keys(((x.clone(),), {"scale": 1.0})))
    assert torch.equal(base[[2, 0]], sample_keys(((x[[2, 0]],), {"scale": 1.0})))
    nudged = x.clone()
    nudged[1, 1, 4] = torch.nextafter(nudged[1, 1, 4], torch.tensor(9.0))
    changed = [
        ((x,), {"scale": 2.0}), ((x,), {"other": 1.0}), ((x.double(),), {"scale": 1.0}), ((x, None), {"scale": 1.0}),
        ((x.view(3, 10),), {"scale": 1.0}), ((x, torch.ones(7)), {"scale": 1.0}),
    ]  # fmt: skip
    assert all(not bool((sample_keys(q) == base).all(1).any()) for q in changed)
    assert (sample_keys(((nudged,), {"scale": 1.0})) == base).all(1).tolist() == [True, False, True]
    mask = torch.tensor([True, False, True])
    assert (sample_keys((x, mask)) == sample_keys((x, ~mask))).all(1).tolist() == [False] * 3
    long = torch.zeros(2, 300_000, dtype=torch.int8)
    other = long.clone()
    other[1, -1] = 1
    assert (sample_keys((long,)) == sample_keys((other,))).all(1).tolist() == [True, False]
    many = sample_keys((torch.arange(20_000)[:, None],))
    assert len(many.unique(dim=0)) == 20_000
    assert all(len(many[:, lane].unique()) == 20_000 for lane in range(4))
    with pytest.raises(lc.CompressionError, match="without a tensor that has a batch"):
        sample_keys(((torch.tensor(1.0),), {}))


def test_digests_see_every_weight_and_the_layers() -> None:
    one, two = teacher(), teacher()
    assert content_digest(one) == content_digest(two)
    one.net[8] = nn.Dropout(0.5)
    assert content_digest(one) != content_digest(two)
    two.register_buffer("extra", torch.ones(1), persistent=False)
    assert content_digest(two) != content_digest(teacher())


# -- what cannot be cached ---------------------------------------------------------------------------------------------


class Scalar(Counted):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), torch.zeros(())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: Distillation(lc.EMATeacher(), cache=f), "average changes with every step"),
        (lambda f: Distillation(teacher(), losses=[lc.AttributionMatching("net.5")], cache=f), "or use AT"),
        (lambda f: Distillation(teacher(), losses=[lc.DKD()], cache=lc.TeacherCache(f, top_k=2)), "use KD or TokenKL"),
        (
            lambda f: Distillation(
                teacher(), losses=[lc.KD(2.0), lc.KD(4.0, name="b")], cache=lc.TeacherCache(f, top_k=2)
            ),
            "stored at one temperature",
        ),
        (
            lambda f: Distillation(
                teacher(), losses=[lc.KD(lc.Scheduled(4.0, 1.0))], cache=lc.TeacherCache(f, top_k=2)
            ),
            "stored at one temperature",
        ),
        (lambda f: Distillation(teacher(cls=Scalar), cache=f), r"a tensor of shape \(\) in it, which cannot be stored"),
    ],
)
def test_refused(make: Any, says: str, tmp_path: Path) -> None:
    trainer = L.Trainer(callbacks=[make(tmp_path)], **{**fits.QUIET, "max_epochs": 1})
    with pytest.raises(lc.CompressionError, match=says):
        trainer.fit(student(), tiny_loader())


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"folder": 3}, TypeError, "is a path"), ({"folder": ""}, TypeError, "is a path"),
        ({"top_k": 0}, ValueError, "at least 1"), ({"check_every": 0}, ValueError, "at least 1"),
        ({"dtype": "int8"}, ValueError, "one of"), ({"limit_gb": 0}, ValueError, "above 0"),
    ],
)  # fmt: skip
def test_arguments(arguments: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        lc.TeacherCache(**{"folder": "x", **arguments})
    with pytest.raises(TypeError, match="cache is a folder"):
        Distillation(teacher(), cache=3)  # type: ignore[arg-type]


def test_a_full_folder_grows_no_more(tmp_path: Path) -> None:
    live, _ = train(None, teacher())
    with pytest.warns(UserWarning, match="reached its limit"):
        cached, shares = train(lc.TeacherCache(tmp_path, limit_gb=3e-6), teacher())
    assert 0 < sum(shares.shares) < 8
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) < 4000
    close(cached, live)


# -- resumed is straight -----------------------------------------------------------------------------------------------


def test_resumed_is_straight(tmp_path: Path) -> None:
    def callbacks() -> Any:
        return [Distillation(fits.teacher(), losses=[lc.KD(2.0), lc.SP("net.5")], cache=tmp_path / "answers")]

    def batches() -> ResumableLoader:
        return ResumableLoader(lc.Replayed(resuming.Augmented(), variants=2), 16, seed=3)

    straight, _ = resuming.fit([*callbacks(), resuming.every_step(tmp_path)], loader=batches())
    for step in (1, 5, 8):
        file = tmp_path / f"step={step}.ckpt"
        resumed, trainer = resuming.fit(callbacks(), resume=file, loader=batches())
        assert trainer.global_step == resuming.STEPS
        assert manifest.equal(dict(straight.state_dict()), dict(resumed.state_dict())), step
