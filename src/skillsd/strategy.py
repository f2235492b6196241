"""Several processes under Lightning: which strategies can run this, and what they have to know."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from skillsd import parallel
from skillsd.errors import ConfigError
from skillsd.policy import of_the_base


def check_strategy(strategy: Strategy) -> None:
    """Refuse what splits the weights, or starts its ranks from a copy of this process: the one reduction is of whole gradients.

    A launcher's variables say nothing about a run on a single device, of which there may be several.

    Raises:
        ConfigError: it is neither one device nor DDP with processes of its own.
    """
    parallel.set_single(isinstance(strategy, SingleDeviceStrategy))
    started = getattr(strategy, "_start_method", "popen")
    if not (isinstance(strategy, SingleDeviceStrategy) or (isinstance(strategy, DDPStrategy) and started == "popen")):
        how = "" if started == "popen" else f" with start_method {started}"
        raise ConfigError(
            f"trainer.strategy is {type(strategy).__name__}{how}: set it to ddp, which starts each rank anew (in a notebook it cannot), or "
            "trainer.devices to 1."
        )


def check_same_step(trainer: Any) -> None:
    """Refuse ranks that have not all read the same checkpoint. All have to call it.

    Raises:
        ConfigError: They stand at different iterations.
    """
    if len(set(parallel.gather(trainer.global_step))) > 1:
        raise ConfigError(
            f"trainer.default_root_dir: {trainer.default_root_dir} is not the same folder on every node, so not all ranks have "
            "read its checkpoint: name one on a filesystem that they share."
        )


def keep_base_local(module: nn.Module) -> None:
    """Make DDP leave the base alone: it would send every rank what that has loaded itself, or its part of it."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, of_the_base(module))
