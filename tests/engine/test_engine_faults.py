"""A pool with a real engine that turns out to be stale, then loses its worker; `test_tree_pool`
has other faults."""

import asyncio

import psutil
import pytest
import torch

from tests.support.stages.engine_with_worker import EngineWithWorker
from tests.support.stages.fake_engines import Fleet, Handle, Source
from tests.support.whole_runs import assert_gone
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config.sections import GateConfig
from treerpo_ray.engine.engine import Engine, make_engine
from treerpo_ray.engine.types import EngineActor, EngineSetup, Sampling
from treerpo_ray.learner.policy import load_policy
from treerpo_ray.prompts.problems import Problem
from treerpo_ray.prompts.prompt_set import PromptSet, load_tokenizer, resolve_model_path
from treerpo_ray.search.tree_pool import TreePool
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.files import WeightFile
from treerpo_ray.weights.manifest import pack_weights

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow]

SHAPE = TreeShape(num_children=(2, 2), step_tokens=(8, 8))


def test_an_engine_that_is_stale_or_without_its_worker_is_replaced_and_its_tree_goes_on(
    small_config, ray_cluster
) -> None:
    """It is made to load older weights behind the pool's back. The next version would make it good
    again, since an engine takes that over whole; until then its trees give it away. Then the
    process that computes for the next one is killed under vLLM's core."""

    config = small_config("engine.num_engines=1")
    tokenizer = load_tokenizer(config.model.path, False)
    ids = tokenizer.encode("20+17-20+25=?\n")
    problem = Problem(id="p", question="20+17-20+25=?", answers=("42",))
    prompts = PromptSet(problems=(problem,), token_ids=(ids,), num_too_long=0)
    policy = load_policy(
        resolve_model_path(config.model.path),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    torch.manual_seed(0)
    told = Fleet()
    actors: list[EngineActor] = []

    def make(setup: EngineSetup, index: int, log_folder: str | None) -> EngineActor:
        """The second engine has the worker."""
        kind = EngineWithWorker if len(actors) == 1 else Engine
        actors.append(make_engine(setup, index, log_folder, kind))
        return actors[-1]

    async def scenario() -> None:
        pool = TreePool(setup=EngineSetup.of(config), log_folder=None, make_engine=make)
        sampling = Sampling(temperature=1.0)
        await pool.begin(
            gate=GateConfig(),
            prompts=prompts,
            shape=SHAPE,
            sampling=sampling,
            seed=0,
            run_log=Handle(told),
        )
        await pool.start()
        packed, files = {}, []
        for version in (1, 2, 3):
            with torch.no_grad():
                for weight in policy.model.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
            file = WeightFile()
            assert file.begin()
            manifest, _ = pack_weights(
                policy.named_weights(),
                version=version,
                dtype=torch.float32,
                chunk_bytes=2**30,
                allocate=file.part,
            )
            files.append(file)
            packed[version] = manifest, file.seal()
            probe = Probe(token_ids=ids, logprobs=policy.sequence_logprobs(ids).tolist())
            if version == 3:
                [stale] = pool.engines.replicas
                await actors[0].api.load.remote(*packed[1])
            manifest, place = packed[version]
            await pool.serve(manifest, Source(place), probe, should_probe=True)
        assert pool.engines.replicas == (stale,), "a version makes it good"

        await actors[0].api.load.remote(*packed[1])
        assert [stats.version for stats in await pool.stats()] == [1]
        [tree] = [tree async for tree in pool.evaluate(prompts, SHAPE, sampling, seed=3)]
        assert (tree.tree.min_version, tree.tree.max_version, tree.attempt) == (3, 3, 1)
        [moved] = told.of("tree_moved")
        assert "sampled with version 1 after it had proved 3" in str(moved["reason"])
        [fresh] = pool.engines.replicas
        assert fresh is not stale
        assert probe.distance(await actors[1].api.probe.remote(ids)) < config.sync.probe_tolerance

        core = psutil.Process(told.of("engine_serving")[-1]["core"])
        [worker] = [child for child in core.children() if "Worker" in " ".join(child.cmdline())]
        growing = asyncio.ensure_future(anext(pool.evaluate(prompts, SHAPE, sampling, seed=4)))
        while not fresh.num_trees:
            await asyncio.sleep(0)
        worker.kill()
        tree = await growing
        assert (tree.tree.min_version, tree.tree.max_version, tree.attempt) == (3, 3, 1)
        assert "core of engine 0 is dead" in str(told.of("engine_lost")[-1]["reason"])
        assert pool.engines.replicas != (fresh,)
        for process in (core, worker):
            assert_gone(process)
        await pool.stop()

    asyncio.run(scenario())
