"""Bad input to a fit: a clear error, before training where that is possible, and everything as before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from bad_input import EARLY, Lit, X, refuses, state, trainer, unchanged
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, IterableDataset

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, CompressionMonitor, Distillation, ExactResume, Pruning
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.errors import CompressionError

TECHNIQUES: dict[str, Callable[..., L.Callback]] = {
    "masks": lambda schedule=EARLY: Pruning(0.5, schedule=schedule),
    "channels": lambda schedule=EARLY: ChannelPruning(0.6, schedule=schedule),
    "loss weight": lambda schedule=EARLY: Distillation(
        TinyNet(), losses=[lc.KD(weight=lc.Scheduled(0.0, 1.0, schedule))]
    ),
    "task weight": lambda schedule=EARLY: Distillation(TinyNet(), task_weight=lc.Scheduled(0.0, 1.0, schedule)),
}


@pytest.fixture(params=TECHNIQUES)
def technique(request: pytest.FixtureRequest) -> Callable[..., L.Callback]:
    return TECHNIQUES[request.param]


# ------------------------------------------------------------------------------------------------- length of the run
class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.randn(1, 8, 8), i % 4) for i in range(64)])


class Stop(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 5


UNKNOWN: dict[str, dict[str, Any]] = {
    "endless": {"max_epochs": -1},
    "by time": {"max_epochs": -1, "max_time": {"seconds": 30}},
    "iterable": {"loader": DataLoader(Endless(), 16)},
}


@pytest.mark.parametrize("length", UNKNOWN)
def test_unknown_length(technique: Callable[..., L.Callback], length: str) -> None:
    says = r"begin='10%'\) needs the length of the run, which is unknown.*Give.*in optimizer steps, such as begin=500"
    refuses(TinyNet(), says, technique(lc.Schedule()), Stop(), **UNKNOWN[length])


@pytest.mark.parametrize("length", UNKNOWN)
def test_steps_need_no_length(length: str) -> None:
    settings = dict(UNKNOWN[length])
    loader = settings.pop("loader", tiny_loader())
    module = TinyNet()
    trainer(Pruning(0.5, schedule=EARLY), Stop(), **settings).fit(module, loader)
    assert sparsity(module) == pytest.approx(0.5, abs=1e-3)
    known = {"max_steps": 6, "max_epochs": -1}
    trainer(Pruning(0.6, schedule=lc.Schedule(every=1)), **known).fit(module, loader)
    assert sparsity(module) == pytest.approx(0.6, abs=1e-3)


def test_changing_accumulation(technique: Callable[..., L.Callback]) -> None:
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    refuses(TinyNet(), "accumulation that changes between epochs", technique(lc.Schedule()), changing)


def test_constant_accumulation_by_a_scheduler() -> None:
    callback = Pruning(0.5, schedule=lc.Schedule(begin=0, end="100%", every=1))
    trainer(callback, GradientAccumulationScheduler({0: 2})).fit(TinyNet(), tiny_loader())
    assert callback.resolved is not None
    assert callback.resolved.events == (0, 1, 2, 3)


def test_too_late(technique: Callable[..., L.Callback]) -> None:
    refuses(TinyNet(), r"begins at step 100, but the run has 8 steps \(0 to 7\)", technique(lc.Schedule(begin=100)))


def sparsity(module: nn.Module) -> float:
    weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


# --------------------------------------------------------------------------------------------- targets that cannot be
NEAR = r"{0}='nett.0' matches no module of this model. Did you mean 'net.0'"
CALLS: list[tuple[str, Callable[[], L.Callback], str]] = [
    ("targets", lambda: Pruning(0.5, schedule=EARLY, targets=("nett.0",)), NEAR.format("targets")),
    ("exclude", lambda: Pruning(0.5, schedule=EARLY, exclude=("nett.0",)), NEAR.format("exclude")),
    ("all excluded", lambda: Pruning(0.5, schedule=EARLY, exclude=("net",)), "leaves out all 3.*Narrow exclude"),
    ("sparsity", lambda: Pruning(0.999, pattern="filter", schedule=EARLY), "0.999 cannot be met.*lower the sparsity"),
    ("pattern", lambda: Pruning(0.5, pattern="row", schedule=EARLY), r"spares the outputs of the last layer.*targets="),
    ("channel targets", lambda: ChannelPruning(0.5, schedule=EARLY, targets=("nett.0",)), NEAR.format("targets")),
    ("channel exclude", lambda: ChannelPruning(0.5, schedule=EARLY, exclude=("nett.0",)), NEAR.format("exclude")),
    ("all kept", lambda: ChannelPruning(0.5, schedule=EARLY, exclude=("net",)), "leaves out all 3 modules"),
    ("macs", lambda: ChannelPruning(0.001, schedule=EARLY), "cannot be met.*still costs.*ask for at least that much"),
    ("at setup", lambda: ChannelPruning(0.001, schedule="setup", example_inputs=X), "cannot be met.*at least that"),
    ("no example", lambda: ChannelPruning(0.5, schedule="setup"), "no training batch yet; pass example_inputs="),
    (
        "example", lambda: ChannelPruning(0.5, schedule=EARLY, example_inputs=torch.zeros(2, 3, 8, 8)),
        "example call of 'the model' fails.*to have 1 channels, but got 3.*give example_inputs= with which",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "says"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_what_cannot_be_done(make: Callable[[], L.Callback], says: str) -> None:
    refuses(TinyNet(), says, make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pruning(0.5, schedule=EARLY), lambda: Pruning(0.5, schedule=EARLY, mode="soft"),
        lambda: Pruning(0.5, pattern="filter", schedule=EARLY), lambda: Pruning(pattern="2:4", schedule=EARLY),
        lambda: Pruning(pattern="2:4", scope="local", schedule=EARLY), lambda: ChannelPruning(0.5, schedule=EARLY),
    ],
)  # fmt: skip
def test_nan_at_the_start(make: Callable[[], L.Callback]) -> None:
    module = TinyNet()
    with torch.no_grad():
        module.net[3].weight[0, 0, 0, 0] = math.nan  # type: ignore[index, union-attr]
    refuses(module, "net.3.weight'?.* (NaN|diverged)", make())


class Diverge(L.Callback):
    """Weights become NaN after the first event."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            weight = pl_module.net[3].weight.data.view(-1)
            weight[weight.abs().argmax()] = math.nan  # not a masked one
            self.before = state(pl_module)


@pytest.mark.parametrize("options", [{}, {"mode": "soft"}, {"pattern": "filter"}, {"pattern": "2:4", "sparsity": None}])
def test_nan_in_the_middle_of_a_fit(options: dict[str, Any]) -> None:
    module, diverge = TinyNet(), Diverge()
    callback = Pruning(**{"sparsity": 0.4, "schedule": EARLY, **options})
    fitter = trainer(diverge, callback)
    with pytest.raises(
        CompressionError, match=r"net.3.weight contain NaN.*find the step at which the weights diverged"
    ):
        fitter.fit(module, tiny_loader())
    assert callback.done == [1]
    assert state(module)["values"] == diverge.before["values"]
    assert all(type(part).__module__.startswith("torch.nn") for name, part in module.named_modules() if name)
    masks = module.__dict__["_lc_masks"]  # those of the first event
    assert set(masks) <= {"net.0.weight", "net.3.weight", "net.9.weight"}
    fitter.save_checkpoint("later.ckpt")
    assert manifest.equal(torch.load("later.ckpt", weights_only=True)["lightning_compress"]["masks"], masks)


# ------------------------------------------------------------------------------------------------------ strange models
class Strange(nn.Module):
    """Zero-dimensional and empty parameters, layers without outputs or inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.nothing = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
        self.no_output, self.no_input = nn.Linear(4, 0), nn.Linear(0, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) * self.scale
        return torch.cat([y, self.no_input(self.no_output(y))], 1)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "column", "2:4", "block:2x2"])
def test_empty_parameters_are_no_trouble(pattern: str, scope: Any) -> None:
    module = Lit(Strange())
    fitter = trainer(Pruning(0.4, pattern=pattern, scope=scope, schedule=EARLY), CompressionMonitor(print_events=False))
    fitter.fit(module, tiny_loader())
    assert 0.3 < sparsity(module.net.body) < 0.5


def test_cutting_beside_empty_parameters() -> None:
    module = Lit(Strange())
    trainer(ChannelPruning(0.6, schedule=EARLY), CompressionMonitor(print_events=False)).fit(module, tiny_loader())
    assert module.net.body[1].out_features < 16


def test_only_empty_targets() -> None:
    pruning = Pruning(0.5, schedule=EARLY, targets=("net.no_output", "net.no_input"))
    refuses(Lit(Strange()), "all empty, so there is nothing to prune; target other layers", pruning)


def flat(*layers: nn.Module) -> Lit:
    return Lit(nn.Sequential(nn.Flatten(), *layers))


def integers() -> nn.Linear:
    layer = nn.Linear(64, 4)
    layer.weight = nn.Parameter(torch.ones(4, 64, dtype=torch.int8), requires_grad=False)
    return layer


def pruned() -> nn.Linear:
    return prune.l1_unstructured(nn.Linear(64, 4), "weight", 0.3)


def normed() -> nn.Linear:
    return parametrizations.weight_norm(nn.Linear(64, 4))


@pytest.mark.parametrize("callback", [Pruning(0.5, schedule=EARLY), ChannelPruning(0.5, schedule=EARLY)])
def test_nothing_to_work_on(callback: L.Callback) -> None:
    refuses(
        flat(nn.BatchNorm1d(64)), r"matches .*net.1 \(BatchNorm1d\), but none of these is one of .*Linear", callback
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_integer_weights(pattern: str) -> None:
    callback = Pruning(0.5, pattern=pattern, schedule=EARLY)
    refuses(flat(integers()), r"'net.1.weight' \(torch.int8\).*prune before quantizing, or .*exclude=", callback)


@pytest.mark.parametrize("layer", [normed, pruned])
def test_computed_weights(layer: Callable[[], nn.Module]) -> None:
    says = "weight of 'net.1' is computed from other.*remove_parametrizations.*prune.remove.*exclude"
    refuses(flat(layer()), says, Pruning(0.5, schedule=EARLY))


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_lazy_layers(mode: Any) -> None:
    module = flat(nn.LazyLinear(16), nn.Linear(16, 4))
    if mode == "hard":
        trainer(CompressionMonitor(print_events=False), Pruning(0.5, schedule=EARLY)).fit(module, tiny_loader())
        assert sparsity(module) == pytest.approx(0.5, abs=0.01)
    now = lc.Schedule(begin=0, curve="constant")
    fitter = trainer(Pruning(0.5, schedule=now))
    with pytest.raises(
        CompressionError, match=r"'net.1.weight' has no shape yet.*run a batch through the model before"
    ):
        fitter.fit(flat(nn.LazyLinear(16), nn.Linear(16, 4)), tiny_loader())


@pytest.mark.parametrize(
    "callback",
    [Pruning(0.5, schedule=EARLY), ChannelPruning(0.5, schedule="setup", example_inputs=X), CompressionMonitor(),
     Distillation("initial")],
)  # fmt: skip
def test_meta_device(callback: L.Callback) -> None:
    with torch.device("meta"):
        module = TinyNet()
    with unchanged(module), pytest.raises(NotImplementedError) as raised:  # Lightning's teardown fails on such modules
        trainer(callback).fit(module, tiny_loader())
    causes = [raised.value]
    while causes[-1].__context__ is not None:
        causes.append(causes[-1].__context__)  # type: ignore[arg-type]
    assert any("'net.0.weight' is on the meta device" in str(error) for error in causes)


# --------------------------------------------------------------------------------------------------- teacher, student
class Five(nn.Module):
    def __init__(self, inputs: int = 64, classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Direct(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.forward(batch[0]), batch[1])


class Unused(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([p.sum() for p in self.parameters()]).sum()


def with_nan() -> TinyNet:
    module = TinyNet()
    nn.init.constant_(module.net[0].weight, math.nan)  # type: ignore[index, union-attr]
    return module


def on_meta() -> TinyNet:
    with torch.device("meta"):
        return TinyNet()


TEACHERS: list[tuple[str, Callable[[TinyNet], L.Callback], str]] = [
    ("itself", lambda m: Distillation(m), "teacher is the student itself; pass a copy"),
    ("a part of itself", lambda m: Distillation(m.net, student="net"), "teacher is the student itself; pass a copy"),
    ("shared weights", lambda m: Distillation(nn.Sequential(m.net)), "'0.0.weight' is the model's own.*pass a copy"),
    ("student", lambda m: Distillation(TinyNet(), student="nett"), "no module 'nett'. Did you mean 'net'"),
    ("deep student", lambda m: Distillation(TinyNet(), student="net.99"), "no module 'net.99'. Did you mean 'net.9'"),
    ("classes", lambda m: Distillation(Five()), r"student \(16, 4\), teacher \(16, 5\).*Use a teacher with"),
    ("input", lambda m: Distillation(Five(32, 4)), r"teacher \(Five\) cannot answer .*\(16, 1, 8, 8\).*wrap it"),
    ("NaN", lambda m: Distillation(with_nan()), "'net.0.weight' holds NaN.*take an earlier checkpoint"),
    ("meta", lambda m: Distillation(on_meta()), "'net.0.weight' is on the meta device.*load its weights"),
    ("no file", lambda m: Distillation("initail"), "no checkpoint at 'initail'; give the path.*or 'initial'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "says"), [c[1:] for c in TEACHERS], ids=[c[0] for c in TEACHERS])
def test_teachers(make: Callable[[TinyNet], L.Callback], says: str) -> None:
    module = TinyNet()
    refuses(module, says, make(module))


@pytest.mark.parametrize("cls", [Direct, Unused])
def test_a_forward_that_is_never_called(cls: type[TinyNet]) -> None:
    refuses(cls(), r"which `training_step` did not call.*write `self.net\(x\)`, not", Distillation(TinyNet()))


def test_an_example_that_calls_nothing() -> None:
    refuses(Unused(), "called no module at all.*or pass example_inputs=", ChannelPruning(0.5, schedule=EARLY))


# ----------------------------------------------------------------------------------------------------- other callbacks
def test_names() -> None:
    says = "2 compression callbacks are named 'a'.*give each its own with name="
    refuses(TinyNet(), says, Pruning(0.5, schedule=EARLY, name="a"), ChannelPruning(0.5, schedule=EARLY, name="a"))
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `Pruning`.*unique"):  # Lightning's
        trainer(Pruning(0.5), Pruning(0.6))
    two = Pruning(0.3, schedule=EARLY, targets=("net.0",), name="a"), Pruning(0.6, schedule=EARLY, targets=("net.3",))
    trainer(*two).fit(TinyNet(), tiny_loader())


def test_mixes_that_cannot_work() -> None:
    swa, cuts = StochasticWeightAveraging(1e-2), ChannelPruning(0.5, schedule=EARLY)
    refuses(TinyNet(), "changes shapes.*Use WeightAveraging or EMAWeightAveraging", swa, cuts)
    other = ModelPruning("l1_unstructured")
    refuses(TinyNet(), "Use lightning_compress.callbacks.Pruning instead", other, Pruning(0.5, schedule=EARLY))


def test_a_refusal_undoes_what_was_cut_at_setup() -> None:
    cut = ChannelPruning(0.5, schedule="setup", example_inputs=X)
    refuses(TinyNet(), "no module 'nett'", cut, Distillation(TinyNet(), student="nett"))
    soft = Pruning(0.5, mode="soft")
    refuses(TinyNet(), "needs the length of the run", cut, soft, Distillation(TinyNet()), Stop(), max_epochs=-1)


class Fails(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise ValueError("the user's own")


def test_an_error_of_the_user_is_shown_as_it_is(technique: Callable[..., L.Callback]) -> None:
    begin = lc.Schedule(begin=2, end=3, every=1)
    kind, says = (ValueError, "^the user's own$")
    callback = technique(begin)
    if isinstance(callback, ChannelPruning):
        kind, says = (CompressionError, "example step raised ValueError: the user's own")  # type: ignore[assignment]
    refuses(Fails(), says, callback, kind=kind)


@pytest.mark.parametrize("name", [*TECHNIQUES, "monitor", "resume"])
def test_barebones(name: str) -> None:
    callback = {**TECHNIQUES, "monitor": CompressionMonitor, "resume": ExactResume}[name]()
    L.Trainer(accelerator="cpu", barebones=True, max_epochs=2, callbacks=[callback]).fit(TinyNet(), tiny_loader())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_do_nothing(stage: str) -> None:
    """Even arguments that would be refused in a fit."""
    module = TinyNet()
    ours = [
        Pruning(0.5, targets=("nowhere",)), ChannelPruning(0.5, schedule="setup"), Distillation("nowhere.ckpt"),
        CompressionMonitor(), ExactResume(),
    ]  # fmt: skip
    loader: Any = DataLoader([x for x, _ in tiny_data(4)], 2) if stage == "predict" else tiny_loader()
    with unchanged(module):
        getattr(trainer(*ours), stage)(module, loader)
