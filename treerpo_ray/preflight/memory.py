"""Memory: the plan of what a worker and an engine take, and whether that fits their GPUs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

from treerpo_ray.config import Config
from treerpo_ray.preflight.machine import GIB
from treerpo_ray.preflight.model_sizes import (
    ACTIVATIONS,
    CACHE,
    CUDA,
    GATHERED,
    PARTS,
    REFERENCE,
    TRAINING,
    WEIGHTS,
    ModelSizes,
    cache_bytes_a_token,
    engine_parts,
    worker_parts,
)

KEPT = (WEIGHTS, TRAINING, REFERENCE)
"""Parts of a worker that lie in main memory if it offloads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """GiB that each part takes, on each GPU that a worker or an engine has.

    Args:
        worker: By part; without `activations` where only the number of parameters is known.
        offloaded: What a worker on a GPU has in main memory instead.
        engine: By part; the KV cache is missing where it takes what its GPU has left and nobody
            says how much that is.
    """

    worker: dict[str, float]
    offloaded: float
    engine: dict[str, float]

    @classmethod
    def of(cls, config: Config, num_parameters: float, sizes: ModelSizes | None) -> Self:
        """The plan of a run of a model."""
        worker = worker_parts(config, num_parameters, sizes)
        is_offloaded = config.learner.offload and config.learner.resources.get("GPU", 0) > 0
        moved = [worker.pop(part, 0.0) for part in KEPT] if is_offloaded else []
        return cls(
            worker=worker,
            offloaded=sum(moved),
            engine=engine_parts(config, num_parameters, sizes),
        )

    def table(self, config: Config) -> list[str]:
        """Lines of a table, at most 68 columns wide."""
        has_all = {ACTIVATIONS} <= self.worker.keys() and {CACHE} <= self.engine.keys()
        rows: list[tuple[str, float | None, float | None]] = [
            (part, self.worker.get(part), self.engine.get(part))
            for part in PARTS
            if part in self.worker | self.engine
        ]
        total = "together" if has_all else "together, at least"
        rows.append((total, sum(self.worker.values()), sum(self.engine.values())))
        on_gpu = (config.learner.gpu_memory_gib, config.engine.gpu_memory_gib)
        if on_gpu != (None, None):
            rows.append(("of gpu_memory_gib", *on_gpu))
        if self.offloaded:
            rows.append(("in main memory", self.offloaded, None))
        unit, scale = _unit(value for _, *values in rows for value in values)
        head = f"{unit} a GPU" if uses_gpus(config) else unit
        fewest, most = config.engine.num_engines, config.engine.most
        engines = f"{fewest} engine(s)" if fewest == most else f"{fewest} to {most} engines"
        return [
            f"{head:22}{f'{config.learner.num_workers} worker(s)':>16}{engines:>18}",
            *(
                f"{name:22}{_cell(worker, scale):>16}{_cell(engine, scale):>18}"
                for name, worker, engine in rows
            ),
        ]

    def engine_line(self) -> str:
        """What an engine takes, in one line, for a job that has no learner."""
        total = sum(self.engine.values())
        unit, scale = _unit([total])
        parts = ", ".join(
            f"{part} {_cell(self.engine[part], scale)}" for part in PARTS if part in self.engine
        )
        at_least = "" if {ACTIVATIONS, CACHE} <= self.engine.keys() else "at least "
        return f"an engine takes {at_least}{_cell(total, scale)} {unit}: {parts}"


def _unit(gib: Iterable[float | None]) -> tuple[str, int]:
    """The unit in which the largest of some amounts has digits before its point, and how many of
    them are a GiB."""
    return ("GiB", 1) if max(each or 0.0 for each in gib) >= 1 else ("MiB", 1024)


def _cell(gib: float | None, scale: int = 1) -> str:
    return "-" if gib is None else number(gib * scale, 2)


def number(amount: float, digits: int = 1) -> str:
    """An amount with so many digits behind its point, or two that are not zero.

    >>> number(12.34), number(0.0123), number(0)
    ('12.3', '0.012', '0.0')
    """
    is_small = 0 < amount < 10.0 ** (1 - digits)
    return f"{amount:.2g}" if is_small else f"{amount:.{digits}f}"


def uses_gpus(config: Config) -> bool:
    """Whether workers or engines are to have GPUs."""
    return any(part.resources.get("GPU", 0) > 0 for part in (config.learner, config.engine))


# What does not fit ---------------------------------------------------------------------------


def misfit(
    config: Config, num_parameters: float, sizes: ModelSizes | None, *, trains: bool = True
) -> str | None:
    """What does not fit the GPUs that the configuration names, in one line; None if all does."""
    plan = MemoryPlan.of(config, num_parameters, sizes)
    if not trains:
        learner = replace(config.learner, resources={}, min_workers=None, gpu_memory_gib=None)
        config = replace(config, learner=learner)
    return next(_misfits(config, plan, sizes), None)


def _misfits(config: Config, plan: MemoryPlan, sizes: ModelSizes | None) -> Iterator[str]:
    if config.learner.resources.get("GPU", 0) > 0:
        yield from _worker_misfits(config, plan.worker)
    if config.engine.resources.get("GPU", 0) > 0:
        yield from _engine_misfits(config, plan.engine, sizes)
    yield from _shared_misfits(config, plan)


def _worker_misfits(config: Config, parts: dict[str, float]) -> Iterator[str]:
    has, needs = config.learner.gpu_memory_gib, sum(parts.values())
    if has is None or needs <= has:
        return
    fixed = needs - parts.get(ACTIVATIONS, 0.0)
    one = f"a worker of {config.model.path}"
    start = f"learner.gpu_memory_gib={has:g}: {one} needs {number(needs)} GiB"
    learner = config.learner
    if fixed > has and not learner.shard:
        yield (
            f"{start}, {number(fixed)} of them for the whole model with its gradients and "
            "optimizer: set learner.shard=true, and learner.num_workers to as many GPUs as there "
            "are for them"
        )
    elif fixed > has:
        workers = "min_workers" if learner.min_workers is not None else "num_workers"
        yield (
            f"{start}, {number(fixed)} of them for its part of the model with gradients and "
            f"optimizer: raise learner.{workers}={learner.fewest_workers}, train adapters alone by "
            "lora.rank=32, or set learner.offload=true, which needs main memory instead"
        )
    elif not config.learner.gradient_checkpointing:
        yield (
            f"{start}, {number(parts[ACTIVATIONS])} of them for activations: set "
            "learner.gradient_checkpointing=true"
        )
    else:
        yield (
            f"{start}, {number(parts[ACTIVATIONS])} of them for activations: lower "
            f"learner.token_budget={config.learner.token_budget}"
        )


def _engine_misfits(
    config: Config, parts: dict[str, float], sizes: ModelSizes | None
) -> Iterator[str]:
    engine, path = config.engine, config.max_model_tokens + 1
    cache = parts.get(CACHE)
    needed = None if sizes is None else path * cache_bytes_a_token(config, sizes) / GIB
    has = engine.gpu_memory_gib
    if has is not None and (needs := sum(parts.values())) > has:
        yield (
            f"engine.gpu_memory_gib={has:g}: an engine of {config.model.path} needs "
            f"{number(needs)} GiB, {number(parts[WEIGHTS])} of them for its weights: raise "
            "engine.tensor_parallel or lower engine.kv_cache_gib or engine.max_num_seqs"
        )
    elif cache is not None and needed is not None and cache < needed:
        where = (
            f"engine.gpu_memory_utilization={engine.gpu_memory_utilization:g} of "
            f"engine.gpu_memory_gib={has:g} leaves"
            if engine.kv_cache_gib is None
            else f"engine.kv_cache_gib={engine.kv_cache_gib:g} is"
        )
        yield (
            f"{where} {number(cache, 2)} GiB of KV cache, and one path of {path} tokens needs "
            f"{number(needed, 2)}: raise it"
        )


def _shared_misfits(config: Config, plan: MemoryPlan) -> Iterator[str]:
    """Processes with a part of a GPU each, as many as Ray may put on the same one."""
    learner, engine = config.learner, config.engine
    shares = learner.resources.get("GPU", 0), engine.resources.get("GPU", 0)
    named = [gib for gib in (learner.gpu_memory_gib, engine.gpu_memory_gib) if gib is not None]
    if not named or not any(0 < share < 1 for share in shares):
        return
    needs = sum(plan.worker.values()), sum(plan.engine.values())
    # What each keeps while the other has the memory that it gives back.
    passing = sum(plan.worker.get(part, 0.0) for part in (ACTIVATIONS, GATHERED))
    kept = (needs[0] - passing, plan.engine.get(CUDA, 0.0)) if engine.sleep else needs
    for workers in range(learner.num_workers + 1 if 0 < shares[0] < 1 else 1):
        for engines in range(engine.most + 1 if 0 < shares[1] < 1 else 1):
            total = max(
                workers * needs[0] + engines * kept[1], workers * kept[0] + engines * needs[1]
            )
            # Before an engine starts again, vLLM wants so much to be free beside all others.
            asked = engine.start_share * min(named) - needs[1] if engines else 0.0
            is_together = workers * shares[0] + engines * shares[1] <= 1 and workers + engines > 1
            if is_together and total + max(asked, 0.0) > min(named):
                yield (
                    f"a GPU of {min(named):g} GiB (learner.gpu_memory_gib, engine.gpu_memory_gib) "
                    f"cannot hold {workers} worker(s) of {number(needs[0])} and {engines} "
                    f"engine(s) of {number(needs[1])} GiB, as learner.resources.GPU={shares[0]:g} "
                    f"and engine.resources.GPU={shares[1]:g} allow: lower learner.token_budget or "
                    f"engine.kv_cache_gib{_or_sleep(config)}, or give each a GPU of its own"
                )
                return


def _or_sleep(config: Config) -> str:
    can = not config.engine.sleep and not config.gate.max_staleness
    return ", set engine.sleep=true" if can else ""


def needs_more_memory(config: Config, plan: MemoryPlan, has_gib: float, where: str) -> str | None:
    """What processes take of main memory that one machine or node does not have, in one line.

    Args:
        config: The run's.
        plan: Of it.
        has_gib: Memory that there is for all of them together.
        where: What has it.
    """
    fewest = config.learner.fewest_workers
    needs = {"engine": 0.0, "learner": fewest * plan.offloaded}
    keeps = config.engine.sleep and config.lora.rank > 0  # what adapters are beside, as it sleeps
    if keeps:
        own = plan.engine[WEIGHTS] * config.engine.tensor_parallel
        needs["engine"] = config.engine.num_engines * own
    if not config.engine.resources.get("GPU", 0):
        needs["engine"] = config.engine.num_engines * sum(plan.engine.values())
    if not config.learner.resources.get("GPU", 0):
        needs["learner"] = fewest * sum(plan.worker.values())
    if sum(needs.values()) <= has_gib:
        return None
    cache = config.engine.kv_cache_gib or 0.0
    keys = {
        f"engine.kv_cache_gib={cache:g}": config.engine.num_engines * cache,
        f"learner.token_budget={config.learner.token_budget}": needs["learner"],
    }
    advice = f"lower {max(keys, key=lambda key: keys[key])}"
    if keeps and config.engine.resources.get("GPU", 0):
        advice = "set engine.sleep=false"
    if plan.offloaded:
        advice = "lower learner.num_workers or train adapters alone by lora.rank=32"
    return (
        f"{config.engine.num_engines} engine(s) take {number(needs['engine'])} GiB and "
        f"{fewest} worker(s) {number(needs['learner'])}, and {where} has "
        f"{number(has_gib)}: {advice}"
    )
