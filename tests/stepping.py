"""Small modules, their steps with distillation written by hand, and a callback that uses the step pipeline."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.distillation.losses import KD
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import Teacher
from lightning_compress.pipeline import StepPipeline
from lightning_compress.terms import LossTerm, TapSpec, TapSpecs

# -- the user's code


def mlp(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(inplace=True), nn.Linear(width, 3))


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, seed=0)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class NoIndex(Lit):
    def training_step(self, batch):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1]), "extra": 1}


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


class Siamese(Lit):
    def training_step(self, batch):
        logits = torch.cat([self.net(batch[0]), self.net(batch[0] * 2)])
        return F.cross_entropy(logits, torch.cat([batch[1], batch[1]]))


class ByHand(Lit):
    """What our pipeline must be equal to, with nothing of ours in it."""

    def __init__(self, task_weight: float = 1.0, weight: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.numbers = task_weight, weight, temperature
        self.teacher = [mlp(12, seed=1).eval().requires_grad_(False)]

    def kd(self, logits: Tensor, x: Tensor) -> Tensor:
        temperature = self.numbers[2]
        soft = F.log_softmax(self.teacher[0](x).float() / temperature, 1)
        mine = F.log_softmax(logits.float() / temperature, 1)
        return F.kl_div(mine, soft, log_target=True, reduction="batchmean") * temperature**2

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        return self.numbers[0] * F.cross_entropy(logits, batch[1]) + self.numbers[1] * self.kd(logits, batch[0])


class Gan(L.LightningModule):
    """Alternates: the generator is distilled; the discriminator's loss is its own business."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.critic = mlp(6, seed=0), nn.Linear(3, 1)
        self.seen: list[tuple[str, bool]] = []

    def training_step(self, batch):
        generator, critic = self.optimizers()
        self.toggle_optimizer(critic)
        self.backward_and_step("critic", self.critic(self.net(batch[0])).mean(), critic)
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        self.backward_and_step("generator", -self.critic(self.net(batch[0])).mean(), generator)
        self.untoggle_optimizer(generator)

    def backward_and_step(self, who, loss, optimizer):
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    def backward(self, loss, *args, **kwargs):
        self.seen.append(loss.item())
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.01), torch.optim.SGD(self.critic.parameters(), 0.01)


# -- what a later family of loss terms has to look like


class Hint(LossTerm):
    """FitNets in ten lines: what a later family has to look like."""

    def __init__(self, weight: float = 1.0, name: str = "hint") -> None:
        super().__init__(weight, name)
        self.at = TapSpec("0")

    def taps(self):
        return TapSpecs(student=(self.at,), teacher=(self.at,))

    def build(self, shapes):
        return nn.Linear(shapes.student[self.at][1], shapes.teacher[self.at][1])

    def compute(self, student, teacher, step):
        pairs = zip(student[self.at], teacher[self.at], strict=True)
        project = self.module or nn.Identity()
        return torch.stack([F.mse_loss(project(s), t) for s, t in pairs]).mean()


class Relations(LossTerm):
    """Compares two taps of one network with the same two of the other."""

    def taps(self):
        both = (TapSpec("0"), TapSpec("2", "input"))
        return TapSpecs(student=both, teacher=both)

    def compute(self, student, teacher, step):
        assert len(student) == len(teacher) == 2
        gram = [[x.flatten(1) @ x.flatten(1).T for (x,) in side.values()] for side in (student, teacher)]
        return sum((F.mse_loss(s, t) for s, t in zip(*gram, strict=True)), torch.zeros(()))


# -- what a callback does with the pipeline


class Distil(L.Callback):
    def __init__(self, terms=None, task_weight=1.0, gradient_terms=(), student="net") -> None:
        self.terms = [KD()] if terms is None else terms
        self.task_weight, self.gradient_terms, self.student = task_weight, gradient_terms, student
        self.teacher = Teacher(mlp(12, seed=1))
        self.asked = 0
        self.teacher.module.register_forward_hook(self.count)
        self.history: list[dict[str, float]] = []

    def count(self, *_: Any) -> None:
        self.asked += 1

    def setup(self, trainer, pl_module, stage):
        self.pipeline = StepPipeline(step_of=lambda: trainer.global_step)
        student = pl_module.get_submodule(self.student)
        self.source = TapSource("d", student, self.terms, self.teacher, self.task_weight)
        for term in (self.source, *self.terms):
            term.resolve(8, 8)
        shapes = self.source.measure(lambda: student(torch.zeros(2, 8)))
        self.owned = self.pipeline.attach(self.source, pl_module, shapes)
        self.asked = 0
        self.pipeline.add(self.source)
        for term in self.gradient_terms:
            self.pipeline.add_gradient_term(term)
        self.pipeline.install(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.pipeline.before_optimizer_step(optimizer=optimizer)

    def on_train_batch_end(self, trainer, pl_module, *_: Any):
        self.history.append({name: value.item() for name, value in self.pipeline.last.items()})
        assert not any(tap._recorder.calls for tap in self.source.taps.taps.values())  # nothing holds the graph

    def on_validation_end(self, trainer, pl_module):
        assert not any(tap._recorder.calls for tap in self.source.taps.taps.values())

    def teardown(self, trainer, pl_module, stage):
        self.pipeline.uninstall()

    def on_exception(self, trainer, pl_module, exception):
        self.pipeline.uninstall()


def fit(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 1, "limit_val_batches": 1, "num_sanity_val_steps": 1, **options},
    )
    trainer.fit(module, loader, loader)
    return {name: value.clone() for name, value in module.net.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
