"""One replica from Python, for a program that asks it itself; many of them behind HTTP are service.py's."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from mm_sglang.jobs.service import ServiceOptions, checked

if TYPE_CHECKING:
    from mm_sglang.jobs.driver import GangDriver


async def start_replica(options: ServiceOptions) -> GangDriver:
    """A replica on the Ray cluster that this process is connected to, once it serves.

    It has a placement group of its own, a bundle for each of `options.gpus`, and in it SGLang's RayEngine with the
    plugins loaded in every rank. It is watched, and started again with what it was asked if a rank fails::

        import asyncio, ray
        from mm_sglang.jobs.service import ServiceOptions
        from mm_sglang.jobs.start import start_replica

        async def main():
            ray.init("auto")
            replica = await start_replica(ServiceOptions(model="/models/qwen", gpus=2))
            try:
                answer = await replica.ask("/shared/a.mp4", "what is it?", {"temperature": 0, "max_new_tokens": 64})
                print(answer["text"])
            finally:
                replica.close()

        asyncio.run(main())

    Raises:
        ValueError: settings that are wrong, or more GPUs than the cluster has.
        GangFailed: it does not start; the message says what is missing, or which process ended.
    """
    from mm_sglang.jobs.driver import GangDriver, GangFailed

    driver = GangDriver(**asdict(checked(replace(options, replicas=1))))
    try:
        await driver.ready.wait()
        if driver.lost is not None:
            raise GangFailed(driver.lost)
    except BaseException:  # whoever waits no longer, too
        driver.close()
        raise
    return driver
