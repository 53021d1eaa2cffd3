"""Log-probs of requests: what an engine's actor spends on each sampled token."""

import gc
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from jobs.benches.sides import Row, compared
from treerpo_ray.config import Config

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

NUM_REQUESTS, NUM_TOKENS = 256, 200
"""Requests at a time, and sampled tokens of each."""
MICRO = 1e6


def bench_request_logprobs(_: Config) -> list[Row]:
    """CPU time of an engine's actor a sampled token, in vLLM's own code from the bytes that its
    core sends to finished requests: log-probs at a request's end, with each token, and none.

    Raises:
        AssertionError: the requests do not end with all their log-probs.
    """
    in_bulk = partial(_microseconds, 0, in_bulk=True)
    name = f"request log-probs: {NUM_REQUESTS} requests of {NUM_TOKENS} tokens (CPU time a token)"
    return [
        compared(
            name, ("at the end", in_bulk), ("with each token", partial(_microseconds, 0)), "µs"
        ),
        compared(name, ("at the end", in_bulk), ("none", partial(_microseconds, None)), "µs"),
    ]


def _microseconds(logprobs: int | None, *, in_bulk: bool = False) -> float:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from treerpo_ray.engine.bulk_logprobs import KeptLogprobs, take_in_bulk

    processor, kept = OutputProcessor(None, log_stats=False), KeptLogprobs()
    if in_bulk:
        take_in_bulk(processor)
    queues = _add_requests(processor, logprobs)
    encoder, sent = MsgpackEncoder(), []
    for step in range(NUM_TOKENS):
        outputs = _outputs(step, has_logprobs=logprobs is not None)
        if in_bulk:
            for output in outputs.outputs:
                kept.hold(output)
        sent.append([bytes(memoryview(part)) for part in encoder.encode(outputs)])  # type: ignore[arg-type]
    decoder = MsgpackDecoder(EngineCoreOutputs)
    gc.collect()
    start = time.process_time()
    for message in sent:
        processor.process_outputs(decoder.decode(message).outputs, 0.0, None)
    spent = time.process_time() - start
    for queue in queues:
        done = queue.get_nowait()
        assert isinstance(done, RequestOutput) and done.finished
        found = done.outputs[0].logprobs
        assert logprobs is None or (found is not None and len(found) == NUM_TOKENS)
    return MICRO * spent / (NUM_REQUESTS * NUM_TOKENS)


def _add_requests(
    processor: "OutputProcessor", logprobs: int | None
) -> "list[RequestOutputCollector]":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestOutputCollector

    kind = RequestOutputKind.FINAL_ONLY
    queues = []
    for number in range(NUM_REQUESTS):
        params = SamplingParams(
            max_tokens=NUM_TOKENS,
            logprobs=logprobs,
            flat_logprobs=True,
            detokenize=False,
            output_kind=kind,
        )
        request = EngineCoreRequest(
            request_id=str(number),
            external_req_id=str(number),
            prompt_token_ids=[1] * 50,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        queues.append(RequestOutputCollector(kind, str(number)))
        processor.add_request(request, None, None, 0, queues[-1])
    return queues


def _outputs(step: int, *, has_logprobs: bool) -> "EngineCoreOutputs":
    """Those of one step of the core, with a token for each request."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.outputs import LogprobsLists

    every = LogprobsLists(
        np.full((NUM_REQUESTS, 1), step, np.int32),
        np.full((NUM_REQUESTS, 1), -0.5, np.float32),
        np.ones(NUM_REQUESTS, np.int32),
    )
    is_last = step == NUM_TOKENS - 1
    return EngineCoreOutputs(
        outputs=[
            EngineCoreOutput(
                request_id=str(number),
                new_token_ids=[step],
                new_logprobs=every.slice_request(number, 1) if has_logprobs else None,
                finish_reason=FinishReason.LENGTH if is_last else None,
            )
            for number in range(NUM_REQUESTS)
        ]
    )
