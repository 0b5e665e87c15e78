"""The dense side of mm_sparse: SGLang's own backends for decode, short prompts, dense layers and all else not ours."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from mm_sglang.choice import CUDA_MAJORS

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

log = logging.getLogger(__name__)
PREFILL, DECODE = "fa3", "flashinfer"  # the fastest dense prefill on SM90 (benchmarks/kernels), and graphs for decode


class DenseSide:
    """One backend to hand everything to, and its plans for a batch and for a part of it side by side.

    On CUDA it is SGLang's HybridAttnBackend of FA3 for prefill and FlashInfer for decode, as
    `--prefill-attention-backend fa3 --decode-attention-backend flashinfer` would build it. FA3 holds all of its plan in
    `forward_metadata`, which is why a batch of sparse and dense requests can have two of them; FlashInfer's prefill
    does not, so it is not offered.
    """

    def __init__(self, runner: ModelRunner) -> None:
        if torch.device(runner.device).type == "cpu":
            self.name = "torch_native"
            self.backend: AttentionBackend = TorchNativeAttnBackend(runner)
            self.prefill = self.backend
            return
        if torch.cuda.get_device_capability()[0] not in CUDA_MAJORS:
            raise ValueError(
                f"mm_sparse on {torch.cuda.get_device_name()}: needs SM80 to SM90 for the dense prefill of {PREFILL}"
            )
        from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

        self.name = f"{PREFILL} for prefill, {DECODE} for decode"
        self.prefill = ATTENTION_BACKENDS[PREFILL](runner)
        self.backend = HybridAttnBackend(runner, self.prefill, ATTENTION_BACKENDS[DECODE](runner))

    def plan(self, batch: ForwardBatch) -> Any:
        """Prepare `batch`; what `extend` needs to run it."""
        self.backend.init_forward_metadata(batch)
        return self.prefill.forward_metadata

    def extend(self, plan: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        """The backend's forward_extend under an earlier `plan`."""
        self.prefill.forward_metadata = plan
        return self.backend.forward_extend(*arguments, **options)  # type: ignore[no-any-return]
