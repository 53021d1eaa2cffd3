"""Engine: one vLLM engine in an actor; searches trees and serves one version of the weights.

The whole search of a tree runs in here, so that children find the blocks of their parents in the
prefix cache; finished sibling groups stream out, so that a caller whose engine dies holds them.
"""

import asyncio
import itertools
import logging
import multiprocessing
import os
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import ray
from ray.actor import ActorHandle

from treerpo_ray.actor import MOST_CALLS, first_line, root_cause, shown_as
from treerpo_ray.algo.search import SiblingGroup, TreeShape, grow
from treerpo_ray.algo.tree import ROOT, Step, StopReason, error_step
from treerpo_ray.engine._stop_strings import end_across_steps
from treerpo_ray.engine._vllm_args import adapter_request, engine_args, environment
from treerpo_ray.engine.types import EngineActor, EngineApi, EngineSetup, EngineStats, Sampling
from treerpo_ray.metrics.busy_time import BusyTime, cpu_seconds
from treerpo_ray.prompts.prompt_set import end_token_ids, load_tokenizer
from treerpo_ray.weights.files import HeldFile, WeightsLost
from treerpo_ray.weights.manifest import LoadProof, Manifest
from treerpo_ray.weights.source import DevicePlace, GroupPlace, Place

if TYPE_CHECKING:
    from vllm import CompletionOutput
    from vllm.engine.arg_utils import AsyncEngineArgs

log = logging.getLogger(__name__)

ERROR_LINE = re.compile(r"(?:^|\] |\) )((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)
"""Last line of a trace, behind what vLLM puts before each line."""
POINTER = "See root cause above"
"""In the error of vLLM that only says that its core had one."""


def redirect_output(path: Path) -> None:
    """Send what this process and its children print to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def last_error(printed: str) -> str | None:
    """The error of the last trace that vLLM printed, but for one that only points to another.

    >>> last_error("(EngineCore pid=7) ERROR 11-29 [core.py:9] ValueError: no room")
    'ValueError: no room'
    """
    found = [error for error in ERROR_LINE.findall(printed) if POINTER not in error]
    return found[-1] if found else None


class Engine:
    """A vLLM engine; call `start` before anything else.

    Args:
        setup: What it is started for.
        index: Number of the engine, for logs.
        log_folder: Where vLLM's output goes; None leaves it to Ray.
        check_node: Raises NodeDiffers where the node has other versions than the run.
    """

    def __init__(
        self,
        *,
        setup: EngineSetup,
        index: int,
        log_folder: str | None,
        check_node: Callable[[], None] = lambda: None,
    ) -> None:
        self.setup, self.index, self._check_node = setup, index, check_node
        self._num_loads = 0
        self._version = 0
        """The last that it proved."""
        self._loading = asyncio.Lock()
        self._is_asleep = False
        self._group = ""
        """Name of the group that its workers are in, if they are in one."""
        self._request_ids = itertools.count()
        self._start = uuid.uuid4().hex
        self._totals = np.zeros(4, np.int64)
        self._time = BusyTime()
        """From the time on at which it can sample."""
        self._log = None if log_folder is None else Path(log_folder) / f"engine-{index}.log"
        if self._log is not None:
            redirect_output(self._log)

    def __repr__(self) -> str:
        return f"engine {self.index}"

    async def node(self) -> str:
        """Ray's id of this actor's node."""
        return ray.get_runtime_context().get_node_id()

    async def start(self) -> tuple[int, int]:
        """Load the model; returns the ids of this process and of vLLM's core once it can sample.

        Raises:
            NodeDiffers: its node has other versions than the run.
            RuntimeError: vLLM does not start; one line with its cause.
        """
        os.environ |= environment(self.setup.engine, self.index)
        self._check_node()
        from pydantic import ValidationError
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.v1.engine.async_llm import AsyncLLM

        from treerpo_ray.engine.bulk_logprobs import take_in_bulk
        from treerpo_ray.engine.vllm_worker import ACTOR_VARIABLE

        os.environ[ACTOR_VARIABLE] = str(os.getpid())
        model = self.setup.model
        tokenizer = load_tokenizer(model.path, model.trust_remote_code)
        self._end_ids = frozenset(end_token_ids(model.path, tokenizer))
        self._tokenizer = tokenizer
        start = 0 if self._log is None else self._log.stat().st_size
        try:
            self._llm: AsyncLLM = AsyncLLM.from_engine_args(self.vllm_args())
            take_in_bulk(self._llm.output_processor)
            self._adapters = adapter_request(lora := self.setup.lora)
            agreed = {"lora_rank": lora.rank, "lora_alpha": lora.alpha}
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=agreed))
        except Exception as error:  # vLLM's own may not even be pickled
            if isinstance(error, ValidationError):  # its text has several lines on each fault
                cause = "; ".join(fault["msg"] for fault in error.errors())
            else:
                cause = last_error(self._printed(start)) or root_cause(error)
            raise RuntimeError(f"vLLM does not start: {cause}") from None
        [core] = multiprocessing.active_children()
        assert core.pid is not None  # it runs
        self._time = BusyTime()
        return os.getpid(), core.pid

    def _printed(self, start: int) -> str:
        """What this engine and its processes have printed since its log had so many bytes."""
        if self._log is None:
            return ""
        with self._log.open("rb") as printed:
            printed.seek(start)
            return printed.read().decode(errors="replace")

    def vllm_args(self) -> "AsyncEngineArgs":
        """How vLLM is set up."""
        return engine_args(self.setup)

    async def grow(
        self,
        prompt_ids: list[int],
        shape: TreeShape,
        sampling: Sampling,
        seed: int,
        held: list[SiblingGroup],
    ) -> AsyncIterator[SiblingGroup]:
        """Grow a tree from the groups held; yields groups as they finish, parents first."""
        sampler = _Sampler(engine=self, sampling=sampling, num_prompt_tokens=len(prompt_ids))
        async for group in grow(prompt_ids, shape, sampler, seed=seed, held=held):
            yield group

    async def sample(
        self,
        prefix: list[int],
        *,
        max_tokens: int,
        delimiters: tuple[int, ...],
        seed: int,
        sampling: Sampling,
    ) -> Step:
        """One continuation; see `treerpo_ray.algo.search.Sampler`."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        stop = self.setup.model.stop
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=[*self._end_ids, *delimiters],
            ignore_eos=True,  # the end tokens are ours: vLLM has no tokenizer, or another's
            stop=list(stop),
            include_stop_str_in_output=True,  # else a delimiter that completes one is not seen
            skip_special_tokens=False,  # a stop string may be one
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # The salt keeps blocks of other weights from requests. It is no version's: these come again
        # after a rollback, and a request in flight goes on under its salt with newer weights.
        prompt = tokens_input(prefix, cache_salt=f"load {self._num_loads}")
        request_id = f"{self.index}-{next(self._request_ids)}"
        try:
            with self._time.work():
                async for output in self._llm.generate(
                    prompt, params, request_id, lora_request=self._adapters
                ):
                    final = output
        except VLLMClientError as error:
            log.warning("request %s was turned down: %s", request_id, error)
            return error_step()
        except EngineDeadError:
            # One line: the traces of all requests in flight would say the same.
            raise RuntimeError(f"vLLM's core of engine {self.index} is dead, see its log") from None
        done = final.outputs[0]
        self._totals += (1, len(prefix), final.num_cached_tokens or 0, len(done.token_ids))
        return self._step(done)

    def end_at_stop(self, step: Step, answer: list[int]) -> Step:
        """A step after so much of an answer, ended at a stop string that begins in it."""

        def text_of(ids: list[int]) -> str:
            [text] = self._tokenizer.batch_decode([ids], clean_up_tokenization_spaces=False)
            return text

        return end_across_steps(step, answer, self.setup.model.stop, text_of)

    def _step(self, done: "CompletionOutput") -> Step:
        from vllm.logprobs import FlatLogprobs

        ids = np.asarray(done.token_ids, np.int32)
        if done.finish_reason not in ("stop", "length") or not len(ids):
            return error_step()
        versions = np.zeros(len(ids), np.int32)
        for span in done.weight_versions or []:
            versions[span.start : span.end] = _version(span.version)
        found = done.logprobs  # an array, unless the request had stop strings
        logprobs = found.logprobs if isinstance(found, FlatLogprobs) else found
        # vLLM names the stop string that it ended at, or else the token.
        is_end = int(ids[-1]) in self._end_ids or isinstance(done.stop_reason, str)
        return Step(
            parent=ROOT,
            token_ids=ids,
            logprobs=np.array(logprobs, np.float32),
            versions=versions,
            stop=StopReason.END_OF_TEXT if is_end else StopReason.BOUNDARY,
        )

    async def load(self, manifest: Manifest, place: Place) -> None:
        """Take over the weights of `manifest` and prove it; requests in flight wait and go on.

        Args:
            manifest: What they consist of.
            place: Where this engine finds their bytes.

        Raises:
            WeightsLost: they are not there any more; the engine goes on with what it has.
            RuntimeError: the workers received other bytes or serve another version. Whatever else
                is raised leaves the engine paused and perhaps half loaded: it must be replaced.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async with self._loading:
            with ExitStack() as held:
                chunks = await self._chunks(place, held)
                if self._is_asleep:
                    await self._llm.wake_up(["weights"])
                await self._llm.pause_generation(mode="keep", clear_cache=False)
                self._num_loads += 1  # what is asked from here on is computed with these weights
                await self._llm.start_weight_update()
                for number, chunk in enumerate(chunks):
                    update = chunk | manifest.update_info(number)
                    await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update))
                await self._llm.finish_weight_update(str(manifest.version))
            if self._adapters is not None:
                await self._llm.collective_rpc("treerpo_serve_adapters")
            digests = await self._llm.collective_rpc("treerpo_digests")
            proof = LoadProof(
                version=int(await self._llm.get_weight_version()),
                digests=tuple(tuple(worker) for worker in digests),
            )
            proof.check(manifest)
            self._version = proof.version
            if self._is_asleep:
                await self._llm.wake_up(["kv_cache"])
                self._is_asleep = False
            await self._llm.resume_generation()

    async def _chunks(self, place: Place, held: ExitStack) -> list[dict[str, str | int | list]]:
        """Fields of `StoreUpdate` that say where each chunk comes from, as long as `held` is open.

        Raises:
            WeightsLost: it is not there any more.
        """
        if isinstance(place, DevicePlace):
            found = zip(place.handles, place.sizes, strict=True)
            return [{"handle": handle, "num_bytes": num_bytes} for handle, num_bytes in found]
        if isinstance(place, GroupPlace):
            if place.group.name != self._group:
                arguments = asdict(place.group), place.first_rank, self.setup.engine.join_timeout_s
                try:
                    await self._llm.collective_rpc("treerpo_join", args=arguments)
                except Exception as error:  # another one of the group did not come
                    await self._llm.check_health()
                    raise WeightsLost(f"their group failed: {first_line(error)}") from None
                self._group = place.group.name
            return [{"num_bytes": num_bytes} for num_bytes in place.sizes]
        file = held.enter_context(closing(HeldFile(place))).place
        return [
            {"path": file.path, "offset": offset, "num_bytes": num_bytes}
            for offset, num_bytes in file.parts
        ]

    async def sleep(self) -> None:
        """Give the memory of weights and KV cache back until the next `load`; requests wait.

        On a CPU vLLM keeps the memory, and waits likewise.
        """
        async with self._loading:
            # Of adapters the weights that they are beside come with no version.
            await self._llm.sleep(level=1 if self.setup.lora.rank else 2, mode="keep")
            self._is_asleep = True

    async def probe(self, token_ids: list[int]) -> list[float]:
        """Log-probability (nats, temperature 1) of each token but the first, given those before."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        request_id = f"{self.index}-{next(self._request_ids)}"
        async for output in self._llm.generate(
            tokens_input(token_ids), params, request_id, lora_request=self._adapters
        ):
            final = output
        assert final.prompt_logprobs is not None  # as requested
        logprobs = []
        for position, token in zip(final.prompt_logprobs[1:], token_ids[1:], strict=True):
            assert position is not None  # only the first token has nothing before it
            logprobs.append(position[token].logprob)
        return logprobs

    async def stats(self) -> EngineStats:
        """Totals since the start; raises if vLLM's core is dead."""
        await self._llm.check_health()
        return EngineStats(
            start=self._start,
            num_requests=int(self._totals[0]),
            num_prompt_tokens=int(self._totals[1]),
            num_cached_tokens=int(self._totals[2]),
            num_sampled_tokens=int(self._totals[3]),
            cpu_s=cpu_seconds(),
            busy_s=self._time.busy_s,
            total_s=self._time.total_s,
            version=self._version,
        )

    async def stop(self) -> None:
        """Shut vLLM's processes down."""
        await asyncio.to_thread(self._llm.shutdown)


def make_engine(
    setup: EngineSetup,
    index: int,
    log_folder: str | None,
    kind: type[Engine] = Engine,
    check_node: Callable[[], None] = lambda: None,
) -> EngineActor:
    """An actor of `kind`; Ray places it by the resources and labels of `engine`."""
    resources = dict(setup.engine.resources)
    made = ray.remote(kind).options(
        num_cpus=resources.pop("CPU", 0),
        num_gpus=resources.pop("GPU", 0),
        resources=resources,  # what the two above left
        label_selector=setup.engine.labels or None,
        max_concurrency=MOST_CALLS,
        **shown_as(f"engine {index}"),
    )
    arguments = {"setup": setup, "index": index, "log_folder": log_folder}
    actor = cast(ActorHandle, made.remote(**arguments, check_node=check_node))
    return EngineActor(api=cast(EngineApi, actor), kill=partial(ray.kill, actor))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampler:
    """An engine with its way to draw after a prompt, as the search wants it."""

    engine: Engine
    sampling: Sampling
    num_prompt_tokens: int

    async def sample(
        self, prefix: list[int], *, max_tokens: int, delimiters: tuple[int, ...], seed: int
    ) -> Step:
        step = await self.engine.sample(
            prefix,
            max_tokens=max_tokens,
            delimiters=delimiters,
            seed=seed,
            sampling=self.sampling,
        )
        return self.engine.end_at_stop(step, prefix[self.num_prompt_tokens :])


def _version(label: str) -> int:
    """Version behind vLLM's label; "default" are the weights that it was started with."""
    return 0 if label == "default" else int(label)
