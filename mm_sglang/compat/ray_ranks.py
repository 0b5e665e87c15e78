"""SGLang's ranks as Ray actors of ours.

Why: SGLang's SchedulerActor never calls load_plugins, so the backend `mm_sparse` is unknown in it; it
    calls torch.cuda.set_device where there is no CUDA; and nobody watches it: a rank that is stopped, or whose
    neighbour died in a collective, hangs until the process group's timeout. It also takes the number that its GPU has
    on the host for the number that CUDA knows it by, but Ray shows each actor its own GPU alone, as number 0: on two
    H100s the second rank ended with "invalid device ordinal".
How: REPLACE `sglang.srt.ray.engine._create_scheduler_actor` by one that makes an actor of mm_sglang/jobs/rank.py, which
    holds SGLang's. Installed in a replica's leader only, never by the plugin. `see_all_gpus` shows an actor all of the
    host's GPUs, as SGLang's ranks see them without Ray. SGLang's arguments travel as bytes: to unpickle them imports
    SGLang, which makes CUDA read which GPUs it may see, and Ray would do so before the actor's own first line.
Upstream: sglang/srt/ray/engine.py, sglang/srt/ray/scheduler_actor.py; sgl-project/sglang#26723 would load the plugins.
Versions: 0.5.23. Remove when the actor class can be chosen.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from mm_sglang.jobs.gang import Gang


def install(gang: Gang, environment: dict[str, str]) -> None:
    import ray
    import sglang.srt.ray.engine as engine
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from mm_sglang.jobs.rank import Rank

    def create(*, pg: Any, bundle_idx: int, rank0_node_ip: str, **arguments: Any) -> Any:
        actor = ray.remote(Rank).options(
            num_cpus=0,
            num_gpus=1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(pg, placement_group_bundle_index=bundle_idx),
            runtime_env={"env_vars": environment},
        )
        return actor.remote(gang, arguments["tp_rank"], ray.cloudpickle.dumps(arguments))

    engine._create_scheduler_actor = create


def see_all_gpus() -> None:
    """Undo Ray's narrowing to one GPU; which one this process has stays known.

    Raises:
        RuntimeError: torch is imported already, so that CUDA may have read CUDA_VISIBLE_DEVICES.
    """
    if "torch" in sys.modules:
        raise RuntimeError("see_all_gpus comes too late: torch is imported, and CUDA may know its one GPU already")
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
