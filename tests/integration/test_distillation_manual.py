"""Manual optimization: the generator of a GAN is distilled by whichever backward its loss goes through."""

from __future__ import annotations

from typing import Any

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import Distillation
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.manual import depends_on, nodes_behind
from lightning_compress.pipeline import REACH_PATIENCE


def generator(width: int, seed: int, inputs: int = 64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(inplace=True), nn.Linear(width, 16))


class Gan(L.LightningModule):
    """A generator and a critic, trained in turn as users do it: one of the `styles` below."""

    def __init__(self, style: str = "one fake") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.style = style
        self.net, self.critic = generator(8, 0), generator(8, 1, 16)

    def added(self, images: Tensor, x: Tensor) -> Tensor | float:
        """What a version by hand adds to the generator's loss."""
        return 0.0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        getattr(self, self.style.replace(" ", "_"))(batch[0], *self.optimizers())

    def critics_loss(self, images: Tensor) -> Tensor:
        return self.critic(images).mean() + self.critic(torch.ones_like(images)).square().mean()

    def step(self, loss: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def one_fake(self, x: Tensor, first: Any, second: Any) -> None:
        """The images are computed once: detached for the critic, attached for the generator."""
        images = self.net(x)
        self.step(self.critics_loss(images.detach()), second)
        self.step(-self.critic(images).mean() + self.added(images, x), first)

    def two_fakes(self, x: Tensor, first: Any, second: Any) -> None:
        """Computed anew for the generator; the critic's were not detached from the generator."""
        self.step(self.critics_loss(self.net(x).detach()), second)
        images = self.net(x)
        self.step(-self.critic(images).mean() + self.added(images, x), first)

    def toggled(self, x: Tensor, first: Any, second: Any) -> None:
        """Lightning freezes whom the optimizer does not train."""
        self.toggle_optimizer(second)
        self.step(self.critics_loss(self.net(x)), second)
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        images = self.net(x)
        self.step(-self.critic(images).mean() + self.added(images, x), first)
        self.untoggle_optimizer(first)

    def generator_first(self, x: Tensor, first: Any, second: Any) -> None:
        images = self.net(x)
        self.step(-self.critic(images).mean() + self.added(images, x), first)
        self.step(self.critics_loss(images.detach()), second)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 0.01), torch.optim.Adam(self.critic.parameters(), 0.01)


class ByHand(Gan):
    def __init__(self, style: str) -> None:
        super().__init__(style)
        self.__dict__["teacher"] = generator(24, 7).requires_grad_(False)

    def added(self, images: Tensor, x: Tensor) -> Tensor | float:
        return 10.0 * F.l1_loss(images, self.teacher(x))


STYLES = ["one fake", "two fakes", "toggled", "generator first"]


def train(module: L.LightningModule, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    L.seed_everything(2, verbose=False)
    trainer = L.Trainer(callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 2, **settings})
    trainer.fit(module, tiny_loader())
    return trainer


def ours(weight: float = 10.0, **settings: Any) -> Distillation:
    return Distillation(generator(24, 7), losses=[lc.Regression("l1", weight)], student="net", **settings)


@pytest.mark.parametrize("style", STYLES)
def test_equals_the_generators_loss_written_by_hand(style: str) -> None:
    found, wanted, plain = Gan(style), ByHand(style), Gan(style)
    trainer = train(found, ours())
    train(wanted)
    train(plain)
    assert manifest.equal(dict(found.state_dict()), dict(wanted.state_dict()))
    assert not manifest.equal(dict(found.state_dict()), dict(plain.state_dict()))
    assert float(trainer.callback_metrics["Distillation/regression"]) > 0
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in trainer.optimizers]
    assert held == [{id(p) for p in part.parameters()} for part in (found.net, found.critic)]


@pytest.mark.parametrize("style", STYLES)
def test_weight_0_is_no_callback_bit_for_bit(style: str) -> None:
    found, plain = Gan(style), Gan(style)
    train(found, ours(0.0))
    train(plain)
    assert manifest.equal(dict(found.state_dict()), dict(plain.state_dict()))


def test_features_of_the_generator_are_those_of_the_right_call() -> None:
    class Hinted(ByHand):
        def added(self, images: Tensor, x: Tensor) -> Tensor | float:
            feature, target = (net[1](net[0](x)) for net in (self.net, self.teacher))
            return 3.0 * F.mse_loss(feature, target[:, :8])

    class Narrow(nn.Sequential):
        pass

    teacher = Narrow(*generator(24, 7))
    teacher[1] = nn.Linear(64, 8)
    with torch.no_grad():
        teacher[1].weight.copy_(generator(24, 7)[1].weight[:8])
        teacher[1].bias.copy_(generator(24, 7)[1].bias[:8])
    teacher[3] = nn.Linear(8, 16)
    found, wanted = Gan("one fake"), Hinted("one fake")
    train(found, Distillation(teacher, losses=[lc.Hint("1", 3.0)], student="net", example_inputs=torch.zeros(2, 64)))
    train(wanted)
    for name, value in found.net.state_dict().items():  # the graph by hand has the layer twice
        torch.testing.assert_close(value, wanted.net.state_dict()[name], rtol=1e-4, atol=1e-5)


# -- which call --------------------------------------------------------------------------------------------------------


class Losses(TinyNet):
    """Two losses of the student, each with its own backward and its own call of the student."""

    def __init__(self) -> None:
        super().__init__(width=8)
        self.automatic_optimization = False
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(batch[0]).square().mean())
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.seen.append(loss.item())
        super().backward(loss, *args, **kwargs)


@pytest.mark.parametrize(
    ("calls", "changed"), [("auto", [True, True]), (0, [True, False]), (1, [False, True]), ([0, 1], [True, True])]
)
def test_the_call_can_be_chosen(calls: Any, changed: list[bool]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, found, teacher = Losses(), Losses(), TinyNet(width=8)
    found.load_state_dict(plain.state_dict())
    train(plain, limit_train_batches=1, max_epochs=1)
    callback = Distillation(teacher, student="net", manual=lc.ManualBackward(calls))
    train(found, callback, limit_train_batches=1, max_epochs=1)
    assert [a != b for a, b in zip(plain.seen, found.seen, strict=True)] == changed


class Accumulates(TinyNet):
    """Two batches for one step, each loss halved."""

    scale = 0.0

    def __init__(self) -> None:
        super().__init__(width=8)
        self.automatic_optimization = False

    def added(self, logits: Tensor, x: Tensor) -> Tensor | float:
        return 0.0

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y) + self.added(logits, x)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class AccumulatesByHand(Accumulates):
    def added(self, logits: Tensor, x: Tensor) -> Tensor | float:
        with torch.no_grad():
            asked = self.teacher(x)
        return lc.kd_loss(logits, asked, 2.0)


def test_accumulation_by_hand_scales_the_terms_as_the_loss() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found, wanted, teacher = Accumulates(), AccumulatesByHand(), TinyNet(width=8)
    wanted.load_state_dict(found.state_dict())
    wanted.__dict__["teacher"] = teacher
    train(found, Distillation(teacher, losses=[lc.KD(2.0)], manual=lc.ManualBackward(scale=0.5)))
    train(wanted)
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_module_that_optimizes_automatically_has_no_calls_to_choose() -> None:
    with pytest.raises(lc.CompressionError, match="optimizes automatically, so it has none; leave it out"):
        train(TinyNet(), Distillation(TinyNet(), manual=lc.ManualBackward()))


class Elsewhere(Losses):
    """The student is called, and its loss goes through torch's own backward."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        self.manual_backward(self.net[0].weight.sum())
        self.optimizers().step()


@pytest.mark.parametrize(
    ("module", "manual"), [(Elsewhere, None), (Losses, lc.ManualBackward(calls=5))], ids=["backward", "number"]
)
def test_a_student_that_no_loss_reaches_is_an_error_after_a_while(module: Any, manual: Any) -> None:
    callback = Distillation(TinyNet(), manual=manual, student="net" if module is Losses else None)
    with pytest.raises(lc.CompressionError, match=r"no loss got a term of .'Distillation'.*not `loss.backward"):
        train(module(), callback, max_epochs=1 + REACH_PATIENCE // 4)


# -- the graph ---------------------------------------------------------------------------------------------------------


def test_a_loss_depends_on_what_its_graph_holds() -> None:
    leaf = nn.Parameter(torch.ones(2))
    inner = leaf * 2
    behind = nodes_behind((inner + 1).sum())
    assert depends_on(behind, {"a": [inner, torch.zeros(1)]})
    assert depends_on(behind, leaf)
    assert not depends_on(behind, leaf * 2)
    assert not depends_on(nodes_behind(torch.zeros(1)), inner)
    assert nodes_behind("no tensor") == set()


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"calls": -1}, ValueError, "numbered from 0"),
        ({"calls": "last"}, TypeError, "'auto', or numbers"),
        ({"calls": []}, ValueError, "no loss would get a term"),
        ({"scale": 0}, ValueError, "finite and > 0"),
        ({"scale": "half"}, TypeError, "is a number"),
    ],
)
def test_choices_that_cannot_be(arguments: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        lc.ManualBackward(**arguments)
    with pytest.raises(TypeError, match="manual is a ManualBackward"):
        Distillation(TinyNet(), manual=1)  # type: ignore[arg-type]
