"""What a leader does once its ranks serve: orders from the driver become SGLang requests, and their ends messages."""

from __future__ import annotations

import threading
from typing import Any

from mm_sglang.compat.decoded_video import SCHEME
from mm_sglang.jobs.gang import Gang
from mm_sglang.parallel.wire import Message, Peer

ASK_S = 1.0
ABORT_AGAIN_S = 0.1


class Asking:
    """Args:
    engine: SGLang's RayEngine, whose event loop nobody runs yet.
    peer: the leader's line to the driver.
    """

    def __init__(self, engine: Any, gang: Gang, peer: Peer) -> None:
        self.engine, self.gang, self.peer = engine, gang, peer
        self.loop = engine.loop
        self.tasks: dict[str, Any] = {}  # by rid

    def run(self) -> None:
        """Does not return."""
        threading.Thread(target=self._until_a_rank_ends, daemon=True).start()
        # The engine returns while its detokenizer still imports: a replica that has answered once is ready.
        first = self.engine.async_generate(prompt="ready?", sampling_params={"max_new_tokens": 1, "temperature": 0})
        self.loop.run_until_complete(first)
        threading.Thread(target=self._listen, daemon=True).start()
        self.loop.run_forever()

    def _until_a_rank_ends(self) -> None:
        import ray

        ranks = self.engine._scheduler_init_result
        ranks.block_until_scheduler_exits()
        asked = [actor.get_info.remote() for actor in ranks.scheduler_actors]  # one that still runs does not answer
        ended = ray.wait(asked, num_returns=1, timeout=ASK_S)[0]
        names = ", ".join(f"rank{number}" for number, answer in enumerate(asked) if answer in ended)
        self.peer.send("broken", error=f"{names or 'a rank'} ended (killed or crashed)")

    def _listen(self) -> None:
        """Orders come to a socket of their own, since one thread waits at it all the time."""
        orders = Peer(self.gang.hub, self.gang.token, f"{self.gang.name}.orders")
        orders.send("ready", wait=True)
        while True:
            if order := orders.receive():
                self.loop.call_soon_threadsafe(self._obey, order)

    def _obey(self, order: Message) -> None:
        kind = order.pop("kind")
        if kind == "ask":
            rid = order["rid"]
            self.tasks[rid] = self.loop.create_task(self._answer(**order))
            self.tasks[rid].add_done_callback(lambda _: self.tasks.pop(rid))
        elif kind == "abort":
            self._abort(order["rid"])

    def _abort(self, rid: str) -> None:
        """SGLang forgets an abort that comes while the video is still read, and does not take a second one."""
        if rid not in self.tasks:
            return
        state = self.engine.tokenizer_manager.rid_to_state.get(rid)
        if state is not None and state.dispatched:
            self.engine.tokenizer_manager.abort_request(rid)
        else:
            self.loop.call_later(ABORT_AGAIN_S, self._abort, rid)

    async def _answer(self, *, rid: str, video: str, question: str, sampling: dict[str, Any]) -> None:
        if self.gang.decoders:
            video = f"{SCHEME}{rid}:{video}"
        try:
            found = await self.engine.async_generate(
                prompt=self._prompt(question), video_data=[video], sampling_params=sampling, rid=rid
            )
        except Exception as error:  # of this request; what breaks the replica ends a rank
            said = " ".join(str(error).split())
            self.peer.send("failed", rid=rid, error=f"{type(error).__name__}: {said}", wait=True)
            return
        facts = found["meta_info"]
        finish = facts["finish_reason"] or {}
        if finish.get("type") == "abort":
            self.peer.send("failed", rid=rid, error=f"aborted: {finish.get('message')}", wait=True)
            return
        self.peer.send(
            "answer", wait=True, rid=rid, text=found["text"], finish=finish.get("type"),
            prompt_tokens=facts["prompt_tokens"], completion_tokens=facts["completion_tokens"],
        )  # fmt: skip

    def _prompt(self, question: str) -> str:
        parts = [{"type": "video"}, {"type": "text", "text": question}]
        template = self.engine.tokenizer_manager.processor.apply_chat_template
        return str(template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True))
