"""The process of a replica that asks its ranks: SGLang's RayEngine, driven by messages from the job's driver."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr
from typing import Any

from ray.util.placement_group import PlacementGroup

from mm_sglang.jobs.asking import Asking
from mm_sglang.jobs.detokenizer import run_detokenizer
from mm_sglang.jobs.gang import Gang
from mm_sglang.jobs.patience import refusal
from mm_sglang.parallel.beat import start_beat
from mm_sglang.parallel.placement import cluster_gpus
from mm_sglang.parallel.wire import Peer
from mm_sglang.ports import leased_port


class Leader:
    """A Ray actor; `run` lasts as long as the replica, so its end is the replica's end.

    It has no coroutine: Ray would run all of it inside an event loop of its own, and SGLang needs one to itself.
    """

    def __init__(self, gang: Gang, group: PlacementGroup) -> None:
        self.gang, self.group = gang, group
        self.peer = Peer(gang.hub, gang.token, f"{gang.name}.leader")
        start_beat(self.peer, dict)

    def run(self) -> None:
        try:
            engine = self._start()
        except (Exception, SystemExit) as error:
            if (why := refusal(error)) is None:
                raise
            self.peer.send("refused", error=why, wait=True)
            raise RuntimeError(f"refused: {why}") from error  # an actor that exits says less
        Asking(engine, self.gang, self.peer).run()

    def _start(self) -> Any:
        command, environment = self.gang.command()
        if "SGLANG_PLATFORM" in environment:  # a rank is a core, found by the number of the GPU that Ray gave it
            cores = os.cpu_count() or 1
            binding = "|".join(str(gpu % cores) for gpu in range(cluster_gpus()))
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = binding
        os.environ.update(environment)

        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.plugins import load_plugins
        from sglang.srt.ray.engine import RayEngine
        from sglang.srt.server_args import prepare_server_args

        from mm_sglang.compat import decoded_video, ray_ranks
        from mm_sglang.parallel.decoding import Decoders

        if self.gang.decoders:
            gang = self.gang
            decoders = Decoders(self.group, gang.gpus, gang.hub, gang.token, gang.name, self._broken)
            decoded_video.install(decoders, self.gang.host, self._decoded)
        load_plugins()  # before the arguments are parsed: mm_sparse is a choice of theirs
        ray_ranks.install(self.gang, environment)
        group, (port, self.lease) = self.group, leased_port()
        model, *flags = command[2:]
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                arguments = prepare_server_args(
                    ["--model-path", model, *flags, "--use-ray", "--nccl-port", str(port), "--log-level", "error"]
                )
        except SystemExit as error:  # argparse's, which says what is wrong to nobody else
            raise ValueError(said.getvalue().strip().rpartition("\n")[2]) from error

        class Placed(RayEngine):  # type: ignore[misc]
            _placement_group = group
            run_detokenizer_process_func = staticmethod(run_detokenizer)

            def __init__(self) -> None:  # RayEngine's own takes single arguments, not a parsed command line
                Engine.__init__(self, server_args=arguments)

        return Placed()

    def _broken(self, error: str) -> None:
        self.peer.send("broken", error=error, wait=True)

    def _decoded(self, rid: str, there: int, wanted: int) -> None:
        self.peer.send("decoded", rids=[rid], there=there, wanted=wanted)
