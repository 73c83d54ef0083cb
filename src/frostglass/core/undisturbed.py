"""What a program calls runs as it would alone, whatever the caller is inside of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_ONE = threading.RLock()


@contextmanager
def undisturbed() -> Iterator[None]:
    """In the block gradients are taken, autocast and anomaly detection are off, and new tensors are float32 on the CPU.

    Afterwards all is as it was. One thread at a time: torch's generators and switches are the process's, and two runs
    that set and restore them side by side would disturb each other's draws and leave the settings of the wrong one.
    """
    plain: Any = torch.autocast
    with _ONE, ExitStack() as inside:
        inside.enter_context(torch.inference_mode(False))
        inside.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                inside.enter_context(plain(kind, enabled=False))
        if torch.is_anomaly_enabled():  # which torch.func cannot do under
            inside.enter_context(torch.autograd.set_detect_anomaly(False))
        if torch.get_default_dtype() != torch.float32:
            inside.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":  # only then: a default device costs time at every call
            inside.enter_context(torch.device("cpu"))
        yield
