"""Bulk log-probs: those of a request's sampled tokens come with its last token, in one array.

By itself vLLM sends three small arrays a token from its core to the engine's actor, which costs
both of them several microseconds each and the actor more to put into lists: a cap on the tokens of
all requests together. Here the core keeps them (`make_scheduler`, which vLLM is given by name),
sends them once, and the actor takes them as they are (`take_in_bulk`).

A request with stop strings is left alone: it is the actor that finds them, token by token.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

SCHEDULER = f"{__name__}.make_scheduler"


def _comes_in_bulk(params: "SamplingParams | None") -> bool:
    """Whether a request is for the log-probs of its sampled tokens alone, at its end."""
    return params is not None and params.num_logprobs == 0 and not params.stop


class KeptLogprobs:
    """Log-probs of requests that go on, in vLLM's core."""

    def __init__(self) -> None:
        self._parts: dict[str, list[LogprobsLists]] = {}

    def hold(self, output: EngineCoreOutput) -> None:
        """Take the log-probs out of an output; the last one of its request gets them all."""
        parts = self._parts.setdefault(output.request_id, [])
        if output.new_logprobs is not None:
            parts.append(output.new_logprobs)
            output.new_logprobs = None
        if output.finish_reason is None:
            return
        self.forget(output.request_id)
        if parts:
            output.new_logprobs = LogprobsLists(
                np.concatenate([part.logprob_token_ids for part in parts]),
                np.concatenate([part.logprobs for part in parts]),
                np.concatenate([part.sampled_token_ranks for part in parts]),
            )

    def forget(self, request_id: str) -> None:
        """Of a request that has ended."""
        self._parts.pop(request_id, None)


class InBulk:
    """What is put before a scheduler of vLLM."""

    requests: dict[str, Request]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._kept = KeptLogprobs()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As of the scheduler, which forgets a request that ends in it."""
        in_bulk = {
            name
            for name in scheduler_output.num_scheduled_tokens
            if (request := self.requests.get(name)) and _comes_in_bulk(request.sampling_params)
        }
        found: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        for outputs in found.values():
            for output in outputs.outputs:
                if output.request_id in in_bulk:
                    self._kept.hold(output)
        return found

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """As of the scheduler: what is aborted has no output that would take its log-probs."""
        ended: list[Request] = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        for request in ended:
            self._kept.forget(request.request_id)
        return ended


class _SyncScheduler(InBulk, Scheduler):
    pass


class _AsyncScheduler(InBulk, AsyncScheduler):
    pass


def make_scheduler(*, vllm_config: "VllmConfig", **settings: Any) -> Scheduler:
    """The scheduler of vLLM's core that vLLM would take, with log-probs in bulk."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (_AsyncScheduler if is_async else _SyncScheduler)(vllm_config=vllm_config, **settings)


class SampledLogprobs(LogprobsProcessor):
    """What the actor keeps of a request: nothing, and at its end the log-probs as they come."""

    def update_from_output(self, output: EngineCoreOutput) -> None:
        """Take the array over."""
        if output.new_logprobs is not None:
            self.logprobs = output.new_logprobs.logprobs[:, 0]  # type: ignore[assignment]


def take_in_bulk(processor: "OutputProcessor") -> None:
    """Have an actor's outputs carry log-probs (nats) as one float array where they come in bulk."""
    add = processor.add_request

    def add_request(request: "EngineCoreRequest", *rest: Any, **named: Any) -> None:
        add(request, *rest, **named)
        if _comes_in_bulk(request.sampling_params):
            state = processor.request_states[request.request_id]
            state.logprobs_processor = SampledLogprobs(
                tokenizer=None,
                logprobs=None,
                prompt_logprobs=None,
                cumulative_logprob=None,
                num_logprobs=0,
                num_prompt_logprobs=None,
            )

    processor.add_request = add_request  # type: ignore[method-assign]
