"""Log-probs come with a request's last token, all of them and in order; the rest is untouched."""

from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.engine


def output(name: str, *logprobs: float, is_last: bool = False):
    """What vLLM's core makes of a step: `logprobs` of the tokens that it sampled for a request."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.outputs import LogprobsLists

    ids = np.arange(len(logprobs), dtype=np.int32)
    lists = LogprobsLists(ids[:, None], np.array(logprobs, np.float32)[:, None], ids + 1)
    return EngineCoreOutput(
        request_id=name,
        new_token_ids=ids.tolist(),
        new_logprobs=lists if logprobs else None,
        finish_reason=FinishReason.LENGTH if is_last else None,
    )


class Core:
    """Stands in for a scheduler of vLLM: gives out what it is told to, and frees what has ended."""

    def __init__(self, *, params: dict[str, SimpleNamespace]) -> None:
        self.requests = {
            name: SimpleNamespace(request_id=name, sampling_params=own)
            for name, own in params.items()
        }
        self.steps: list[list] = []

    def update_from_output(self, scheduled: SimpleNamespace, sampled: None) -> dict:
        outputs = self.steps.pop(0)
        for each in outputs:
            if each.finish_reason is not None:
                del self.requests[each.request_id]
        return {0: SimpleNamespace(outputs=outputs)}

    def finish_requests(self, names: list[str], status: object) -> list[SimpleNamespace]:
        return [self.requests.pop(name) for name in names]


def params_of(num_logprobs: int | None = 0, stop: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(num_logprobs=num_logprobs, stop=stop)


def core_of(params: dict[str, SimpleNamespace], steps: list[list]):
    from treerpo_ray.engine.bulk_logprobs import InBulk

    core = type("Scheduler", (InBulk, Core), {})(params=params)
    core.steps = steps
    return core


def step_of(core) -> dict[str, list[float] | None]:
    """The log-probs that are sent in a step, by request."""
    scheduled = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(core.requests, 1))
    return {
        each.request_id: None
        if each.new_logprobs is None
        else each.new_logprobs.logprobs[:, 0].tolist()
        for each in core.update_from_output(scheduled, None)[0].outputs
    }


def test_log_probs_are_kept_by_the_core_until_the_last_token_of_their_request() -> None:
    core = core_of(
        {"a": params_of(), "b": params_of()},
        [
            [output("a", -1.0), output("b", -8.0)],
            [output("a", -2.0, -3.0), output("b")],
            [output("a", -4.0, is_last=True), output("b", -9.0)],
            [output("b", is_last=True)],
        ],
    )
    assert step_of(core) == step_of(core) == {"a": None, "b": None}
    assert step_of(core) == {"a": [-1.0, -2.0, -3.0, -4.0], "b": None}
    assert step_of(core) == {"b": [-8.0, -9.0]}


def test_other_requests_get_theirs_token_by_token() -> None:
    """Of stop strings, which the actor finds as it reads; and of several log-probs a token."""
    for params in (params_of(stop=("END",)), params_of(num_logprobs=3)):
        core = core_of({"a": params}, [[output("a", -1.0)], [output("a", -2.0, is_last=True)]])
        assert [step_of(core), step_of(core)] == [{"a": [-1.0]}, {"a": [-2.0]}]
    core = core_of({"a": params_of(num_logprobs=None)}, [[output("a", is_last=True)]])
    assert step_of(core) == {"a": None}


def test_what_is_aborted_leaves_nothing_behind_for_one_of_its_name() -> None:
    core = core_of({"a": params_of()}, [[output("a", -1.0)], [output("a", -5.0, is_last=True)]])
    request = core.requests["a"]
    step_of(core)
    core.finish_requests(["a"], None)
    core.requests["a"] = request
    assert step_of(core) == {"a": [-5.0]}


def test_the_scheduler_is_the_kind_that_vllm_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from treerpo_ray.engine.bulk_logprobs import InBulk, make_scheduler

    made = []
    monkeypatch.setattr(Scheduler, "__init__", lambda self, **settings: made.append(settings))
    monkeypatch.setattr(AsyncScheduler, "__init__", lambda self, **settings: made.append(settings))
    for is_async in (False, True):
        config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=is_async))
        scheduler = make_scheduler(vllm_config=config, log_stats=True)
        assert isinstance(scheduler, InBulk)
        assert isinstance(scheduler, AsyncScheduler) == is_async
    assert made == [{"vllm_config": made[0]["vllm_config"], "log_stats": True}, made[1]]
