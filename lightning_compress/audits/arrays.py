"""Values of any kind as float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Values = Tensor | Floats | Sequence[float] | Sequence[bool]


def numbers(values: Any) -> Floats:
    """Values as float64 on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
