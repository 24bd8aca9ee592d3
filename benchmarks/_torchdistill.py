"""A student trained by torchdistill's box: what benchmarks run beside us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.core.distillation import DistillationBox
from torchdistill.core.interfaces import forward_proc  # noqa: F401 - registers what the configuration names
from torchdistill.losses import mid_level, util  # noqa: F401

Step = Callable[[Tensor, Tensor], float]


class WithProjector(nn.Module):
    """A student that also projects the features of a layer: torchdistill 1.1.5 has no projector of its own for this.

    Args:
        net: The student.
        layer: Number of the layer whose output is projected.
        projector: A linear map over channels, copied as a 1x1 convolution.
        dims: 1 for sequences, 2 for images.
    """

    def __init__(self, net: nn.Sequential, layer: int = 0, projector: nn.Linear | None = None, dims: int = 2) -> None:
        super().__init__()
        self.net, self.layer, self.projector = net, layer, None
        if projector is not None:
            conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
            self.projector = conv(projector.in_features, projector.out_features, 1)
            with torch.no_grad():
                self.projector.weight.copy_(projector.weight.reshape(self.projector.weight.shape))
                self.projector.bias.copy_(projector.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.net[: self.layer + 1](x)
        if self.projector is not None:
            self.projector(features)
        return self.net[self.layer + 1 :](features)


def box_of(
    student: WithProjector, teacher: nn.Module, rate: float, kd: tuple[float, float] | None = (4.0, 1.0),
    hint: tuple[str, float] | None = None,
) -> DistillationBox:  # fmt: skip
    """Make the box.

    Args:
        student: With a projector if there is a hint.
        teacher: Its teacher.
        rate: Of AdamW, with weight decay 0.01.
        kd: Temperature and weight of KD; the task's cross entropy has weight 1. Without it only the task.
        hint: The teacher's layer, and the weight.
    """
    terms: dict[str, Any] = {}
    io = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": "."}
    if kd is None:
        inputs = {"is_from_teacher": False, "module_path": ".", "io": "output"}
        wrapper = {"input": inputs, "target": {"uses_label": True}}
        terms["task"] = {
            "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": wrapper}, "weight": 1.0,
        }  # fmt: skip
    else:
        settings = {**io, "teacher_module_io": "output", "temperature": kd[0], "alpha": 1.0, "beta": kd[1]}
        terms["kd"] = {"criterion": {"key": "KDLoss", "kwargs": settings}, "weight": 1.0}
    if hint is not None:
        paths = {
            "input": {"is_from_teacher": False, "module_path": "projector", "io": "output"},
            "target": {"is_from_teacher": True, "module_path": hint[0], "io": "output"},
        }
        terms["hint"] = {
            "criterion": {"key": "MSELoss", "kwargs": {}},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": paths}, "weight": hint[1],
        }  # fmt: skip
    config = {
        "num_epochs": 1,
        "teacher": {
            "forward_hook": {"output": [hint[0]]} if hint else {}, "requires_grad": False,
            "forward_proc": "forward_batch_only",
        },
        "student": {
            "forward_hook": {"output": ["projector"]} if hint else {}, "forward_proc": "forward_batch_only",
        },
        "optimizer": {"key": "AdamW", "kwargs": {"lr": rate, "weight_decay": 1e-2}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }  # fmt: skip
    box = DistillationBox(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    box.teacher_model.eval()
    box.student_model.train()
    return box


def step_of(box: DistillationBox) -> Step:
    """One step of it."""

    def step(x: Tensor, y: Tensor) -> float:
        loss = box.forward_process(x, y, None)
        box.post_forward_process(loss)
        return float(loss)

    return step
