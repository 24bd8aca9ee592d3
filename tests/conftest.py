"""Every test leaves the process as it found it; what leaks fails the test that leaked it."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo import eval_frame

torch.set_num_threads(1)  # the sizes used here gain nothing from more, and two-process tests share the cores

COMPILER_REQUIRED = os.environ.get("LC_REQUIRE_COMPILER") == "1"

# Set on purpose, and for the rest of the process, by Lightning, by OpenMP, CUDA and the compilers.
ENVIRONMENT_OF_OTHERS = ("PL_", "PYTEST_", "PYTORCH_NVML_", "KMP_", "CUDA_", "TORCHINDUCTOR_", "TRITON_", "WANDB_")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def has_compiler() -> bool:
    """Whether there is a C++ compiler where inductor looks for one."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and this machine has none")
    if item.get_closest_marker("needs_compiler") and not has_compiler():
        if COMPILER_REQUIRED:
            pytest.fail("no C++ compiler (g++ or clang++) found, and LC_REQUIRE_COMPILER=1 asks for one", pytrace=False)
        pytest.skip("needs a C++ compiler (g++ or clang++) and this machine has none")


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it would take most of the time of each garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Let tests talk to this machine only: what a test needs is in the repository or is made by the test."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(str(address[0])):
            raise OSError(f"a test tried to reach {address[0]!r}: tests use no network")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", local_only)
    yield
    patch.undo()


def _is_local(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1", "0.0.0.0", "", socket.gethostname())


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder: Lightning, W&B and TensorBoard write where they are."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves behind variables, a process group, threads, handlers or switches; clean up after it."""
    environment, switches = dict(os.environ), _switches()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    threads = set(threading.enumerate())
    yield
    leaks = [
        *_leaked_variables(environment),
        *_leaked_process_group(),
        *_leaked_handlers(handlers),
        *_leaked_switches(switches),
        # The compiler keeps its pool of workers for the next compilation.
        *([] if request.node.get_closest_marker("needs_compiler") else _leaked_threads(threads)),
    ]
    if leaks:
        pytest.fail("this test leaks " + "; ".join(leaks), pytrace=False)


def _leaked_variables(before: dict[str, str]) -> list[str]:
    after = dict(os.environ)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed:
        if name.startswith("PYTEST_"):
            continue
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    return [f"the environment variable {name}" for name in changed if not name.startswith(ENVIRONMENT_OF_OTHERS)]


def _leaked_process_group() -> list[str]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    torch.distributed.destroy_process_group()
    return ["a process group"]


def _leaked_handlers(before: dict[signal.Signals, Any]) -> list[str]:
    changed = [number for number in before if signal.getsignal(number) is not before[number]]
    for number in changed:
        signal.signal(number, before[number])
    return [f"a handler for {number.name}" for number in changed]


def _switches() -> dict[str, tuple[Any, Callable[[Any], object]]]:
    """How PyTorch runs modules in this process, and what sets it back."""
    return {
        "fused attention": (torch.backends.mha.get_fastpath_enabled(), torch.backends.mha.set_fastpath_enabled),
        "the stance of the compiler": (eval_frame._stance, eval_frame._set_stance),
        "gradients": (torch.is_grad_enabled(), torch.set_grad_enabled),
        "the default type": (torch.get_default_dtype(), torch.set_default_dtype),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.use_deterministic_algorithms,
        ),
        "the number of threads": (torch.get_num_threads(), torch.set_num_threads),
        "the precision of products": (torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision),
        "anomaly detection": (torch.is_anomaly_enabled(), torch.autograd.set_detect_anomaly),
    }


def _leaked_switches(before: dict[str, tuple[Any, Callable[[Any], object]]]) -> list[str]:
    after = _switches()
    changed = {name: (value, put) for name, (value, put) in before.items() if after[name][0] != value}
    for value, put in changed.values():
        put(value)
    return list(changed)


def _leaked_threads(before: set[threading.Thread]) -> list[str]:
    """A daemon does not keep the process alive; any other thread gets a moment to end."""
    new = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in new:
        thread.join(timeout=2.0)
    return [f"the running thread {thread.name!r}" for thread in new if thread.is_alive()]


def _rng() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()


@pytest.fixture
def rng_untouched() -> Iterator[Callable[[], None]]:
    """Fail a test in which the global random numbers of Python, NumPy or PyTorch moved.

    It checks at the end of the test; call the fixture's value to check at a point of your choice.
    """
    before = _rng()

    def check() -> None:
        moved = _rng()
        names = ("python", "numpy", "numpy", "numpy", "torch")
        changed = sorted({n for n, old, new in zip(names, before, moved, strict=True) if old != new})
        assert not changed, f"the global random numbers moved: {', '.join(changed)}"

    yield check
    check()
