"""All-gathers over SGLang's attention-CP group: NCCL on its own stream on CUDA, gloo in order on a CPU.

Straight on the ProcessGroup: SGLang's GroupCoordinator wraps the same call in CUDA-only operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# torch 2.13's name, and the older one that it deprecates
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """The ranks that share a prefill."""

    rank: int
    size: int
    group: Any  # torch.distributed.ProcessGroup of the devices
    cpu_group: Any  # the same ranks over gloo

    def agree(self, found: Any) -> Any:
        """What the first rank found, on all of them; the host waits."""
        box = [found]
        dist.broadcast_object_list(box, group_src=0, group=self.cpu_group)
        return box[0]

    def gather(self, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts an all-gather of equal parts; what is returned waits for it (the stream does, on CUDA) and gives
        [N * rows, ...] in the order of ranks."""
        part = part.contiguous()
        out = torch.empty((self.size * len(part), *part.shape[1:]), dtype=part.dtype, device=part.device)
        work = all_gather(out, part, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            work.wait()
            return out

        return wait
