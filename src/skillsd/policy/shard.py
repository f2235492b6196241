"""A base whose weights lie split over all ranks: PyTorch's FSDP2, for models that do not fit on one GPU.

Each decoder layer is gathered for its forward, freed after it, and gathered again for its backward. The embedding, the head and the last
norm stay whole on each rank, as do the adapters: the head is used outside of the decoder's forward, and these are read in every step.

Every gather is one of all ranks, so they must come in the same order everywhere, whatever each has to do. Where all know how many forwards
there will be, those with fewer fill up with `idle` ones; where nobody knows, `together` asks before each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from skillsd import parallel
from skillsd.errors import ConfigError

OUT_OF_MEMORY = (
    "model.policy.shard: out of memory in a forward that other ranks take part in, so that it cannot be repeated: set "
    "model.policy.gradient_checkpointing, or smaller model.micro_batch_tokens, model.policy.head_chunk or data.rollout.max_rows."
)


def of_the_base(module: nn.Module) -> list[str]:
    """Names of a module's parameters and buffers that are no adapter's: equal on all ranks or sharded, nobody need send them."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [n for n, _ in named if "lora_" not in n]


class Shards:
    """Splits a base over all ranks and keeps their forwards in step.

    Args:
        base: A causal language model on the CPU, with or without PEFT's layers in it, without gradients but the adapters'.
        device: Where it is to live: layer by layer, so that it never lies there whole.

    Attributes:
        gathered: Bytes of the layers that are whole at one time: one that is computed, one that is being gathered, one gathered before.

    Raises:
        ConfigError: no decoder layers are found.
    """

    def __init__(self, base: Any, device: torch.device) -> None:
        self.backbone: nn.Module = base.get_decoder()
        kinds = set(base._no_split_modules or ())  # transformers: what is never to be split over devices
        layers = [m for m in self.backbone.modules() if type(m).__name__ in kinds]
        if not layers:
            raise ConfigError(f"model.policy.shard: {type(base).__name__} names no decoder layers: set it to false.")
        # Nothing here may hold on to a layer's weights: what `fully_shard` has moved to the device is to be freed when it returns.
        sizes = [sum(p.numel() * p.element_size() for n, p in m.named_parameters() if "lora_" not in n) for m in layers]
        self.gathered = 3 * max(sizes)
        adapters = {p for n, p in base.named_parameters() if "lora_" in n}
        mesh = init_device_mesh(device.type, (parallel.world(),))
        for m in layers:
            fully_shard(m, mesh=mesh, ignored_params=adapters)
        # Without weights of its own: the layers' gathers are overlapped under one root.
        plain = [t for t in (*base.parameters(), *base.buffers()) if not hasattr(t, "to_local")]
        fully_shard(self.backbone, mesh=mesh, ignored_params=set(plain))
        for t in plain:
            t.data = t.data.to(device)
        self._asking = False
        self.backbone.register_forward_pre_hook(self._ask)

    @contextmanager
    def together(self, idle: Callable[[], Any]) -> Iterator[None]:
        """Forwards without gradient in this context, as many as each rank likes. All ranks have to enter it, and leave it at one time.

        Nothing else that they do together may happen in it. `idle` is the forward of a rank that is through.
        """
        if self._asking:  # an outer one sees to it
            yield
            return
        self._asking = True
        try:
            yield
            while parallel.all_reduce_max(0):
                self._asking = False
                idle()
                self._asking = True
        finally:
            self._asking = False

    def _ask(self, *args: Any) -> None:
        if self._asking:
            parallel.all_reduce_max(1)
