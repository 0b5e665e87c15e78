"""Replicas behind Ray Serve: each Serve replica drives one gang, and starts it again when any rank of it fails.

Serve's own health checks see an actor that answers, not a rank that is stopped or a collective that hangs. So a gang is
watched as in a job; what it was asked is asked again, and Serve hears only of a gang that starts no more.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

from mm_sglang.jobs.gang import CONTEXT

MOST_TOKENS = 256  # of an answer, unless the request says otherwise
LEAVE_S = 30.0  # what a replica that is told to go may take for the end of its gang


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Args:
    model, config, extra, max_video_tokens: as for `mm-sglang serve`.
    gpus: ranks of a gang; split: what they share out, see jobs/gang.py; replicas: how many gangs.
    at_once: requests that a gang works on; more of them wait in Serve.
    """

    model: str
    gpus: int = 1
    split: str = CONTEXT
    replicas: int = 1
    config: str | None = None
    extra: tuple[str, ...] = field(default=())
    max_video_tokens: int | None = None
    at_once: int = 8


class Service:
    """The deployment. POST {"video": path, "question": text}, and if need be "max_tokens": N, "schema": {...}."""

    async def __init__(self, options: ServiceOptions) -> None:  # type: ignore[misc]  # Serve awaits it
        from mm_sglang.jobs.driver import GangDriver

        self.driver = GangDriver(**asdict(options))
        await self.driver.ready.wait()
        self.check_health()

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        from mm_sglang.jobs.driver import GangFailed, RequestFailed

        try:
            return JSONResponse(await self.ask(**_fields(await request.body())))
        except (ValueError, RequestFailed) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        except GangFailed as error:
            return JSONResponse({"error": str(error)}, status_code=503)

    async def ask(
        self, *, video: str, question: str, max_tokens: int = MOST_TOKENS, schema: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a deployment's handle calls: text, finish, prompt_tokens, completion_tokens.

        Raises:
            RequestFailed, GangFailed: see mm_sglang/jobs/driver.py.
        """
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_tokens}
        if schema is not None:
            sampling["json_schema"] = json.dumps(schema)
        return await self.driver.ask(video, question, sampling)

    def check_health(self) -> None:
        """RuntimeError once the gang starts no more: Serve then makes another replica."""
        if self.driver.lost is not None:
            raise RuntimeError(self.driver.lost)

    def __del__(self) -> None:
        if driver := getattr(self, "driver", None):
            driver.close()


KINDS = {"video": str, "question": str, "max_tokens": int, "schema": dict}


def _fields(body: bytes) -> dict[str, Any]:
    """Of a request; ValueError names what is wrong with it."""
    fields = json.loads(body)
    if not isinstance(fields, dict):
        raise ValueError(f"needs a JSON object, got {type(fields).__name__}")
    if unknown := sorted(set(fields) - set(KINDS)):
        raise ValueError(f"unknown: {', '.join(unknown)}; known: {', '.join(KINDS)}")
    for name, kind in KINDS.items():
        if name not in fields and name in ("video", "question"):
            raise ValueError(f"{name}: needs one")
        if name in fields and type(fields[name]) is not kind:
            raise ValueError(f"{name}: needs {kind.__name__}, got {type(fields[name]).__name__}")
    return fields


def require_serve() -> None:
    """ValueError if Ray Serve is not here, or cannot work with what is."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise ValueError("a service needs Ray Serve: `pip install 'ray[serve]==2.55.1' 'protobuf<7'`") from error
    protobuf = version("protobuf")
    if int(protobuf.partition(".")[0]) >= 7:  # which took away FieldDescriptor.label
        raise ValueError(f"Ray Serve 2.55.1 needs protobuf before 7, found {protobuf}: `pip install 'protobuf<7'`")


def checked(options: ServiceOptions) -> ServiceOptions:
    """These, with paths that hold on other hosts; ValueError for settings that are wrong, or too many GPUs."""
    from mm_sglang.jobs.run import require_settings, whole_paths
    from mm_sglang.parallel.placement import cluster_gpus, require_gpus

    for each in ("gpus", "replicas", "at_once"):
        if getattr(options, each) < 1:
            raise ValueError(f"{each}={getattr(options, each)}: needs at least 1")
    model, config = whole_paths(options.model, options.config)
    options = replace(options, model=model, config=config)
    require_settings(options)
    require_gpus(options.replicas, options.gpus, cluster_gpus())
    return options


def start_service(
    options: ServiceOptions, *, name: str = "mm-sglang", host: str = "127.0.0.1", port: int = 8000
) -> Any:
    """Start it on the Ray cluster that this process is connected to; returns a handle once every gang serves.

    Who reaches `host` may have any file read that SGLang takes for a video. `ray.serve.delete(name)` ends it.

    Raises:
        ValueError: settings that are wrong, more GPUs than the cluster has, or no Ray Serve.
        RuntimeError: a gang does not start.
    """
    options = checked(options)
    require_serve()
    from ray import serve

    serve.start(http_options={"host": host, "port": port})
    deployment = serve.deployment(
        Service,
        name=name,
        num_replicas=options.replicas,
        max_ongoing_requests=options.at_once,
        graceful_shutdown_timeout_s=LEAVE_S,
        ray_actor_options={"num_cpus": 0},
    )
    return serve.run(deployment.bind(options), name=name)
