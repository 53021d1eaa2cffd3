"""Pace: how fast a run is with more or fewer engines, simulated from steps that it has made.

python -m treerpo_ray.preflight.pace RUN     # a run by its name, folder or URI

An engine is a server of R tokens a second, which all its trees share; one that has fewer trees than
it takes to fill it grows each of them no faster. Gate and learner are the real ones: the trees of
step k may begin once step k - 1 - s is consumed (s: `gate.max_staleness`), an update begins once
all of its trees are there and the update before it is made, and engines stand still while they load
a version. What is not modelled: engines that share a GPU with the learner, autoscaling, failures.
"""

import heapq
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import rich.box
import rich.console
import rich.table

from treerpo_ray.config import Config
from treerpo_ray.config.files import flat_settings, load
from treerpo_ray.errors import run_command
from treerpo_ray.metrics.rows import Row, latest_rows
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import CONFIG_FILE, RunFolder, run_at

COUNTS = tuple(2**power for power in range(11))
"""Engines that are tried: 1 to 1,024."""
NUM_STEPS = 40
"""Learner steps of a simulation, of which the first quarter is left out: it starts empty."""
FEWEST_ROWS = 5
"""Learner steps that tell a pace; the first one holds the start of everything and is left out."""
TREE_STEPS = 10
"""Newest saved learner steps whose trees are drawn from: where the shape adapts, one alone may be
of the shape that few have."""
ENGINE_COUNT = "engine/count"
"""Metric: engines that were there at the end of a learner step."""
NEAR_BEST = 1.05
"""A step that takes at most so many times the shortest one is as good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the stages of a run took; times in seconds."""

    tree_tokens: tuple[float, ...]
    """Sampled tokens of single trees, drawn from at random."""
    engine_rate: float
    """Tokens a second of an engine that is never idle."""
    tree_s: float
    """A tree whose engine has nothing else to do takes no less."""
    update_s: float
    """An update by the workers that there are."""
    load_s: float
    """From the end of an update until engines serve it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured, and of what."""

    found: Measured
    num_engines: int
    """That there were."""
    num_steps: int
    """Learner steps that this is of."""
    num_others: int
    """Learner steps with another number of engines, which are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a simulation came to."""

    num_engines: int
    step_s: float
    idle_engines: float
    """Share of the time of all engines."""
    idle_learner: float
    staleness: float
    """Versions between the one that a tree begins with and the one that trains on it, mean."""


class _Engine:
    """An engine of a simulation; `progress` counts the tokens that each of its trees has got."""

    def __init__(self, *, rate: float, fill: float) -> None:
        self.rate, self.fill = rate, fill
        self.at_s = self.progress = self.busy_s = 0.0
        self.trees: list[tuple[float, int]] = []
        """Progress at which each is finished, and its ticket; a heap."""
        self.changes = 0
        """What was foreseen before the last of them does not happen."""

    def go_on(self, now: float) -> None:
        """Grow what there is until `now`; while it is paused that lies in the past."""
        spent = now - self.at_s
        if spent <= 0:
            return
        if self.trees:
            self.progress += spent * self.rate / max(len(self.trees), self.fill)
            self.busy_s += spent
        self.at_s = now

    def add(self, now: float, ticket: int, tokens: float) -> None:
        """Begin a tree."""
        self.go_on(now)
        heapq.heappush(self.trees, (self.progress + tokens, ticket))

    def pause(self, now: float, until: float) -> None:
        """Grow nothing until then."""
        self.go_on(now)
        self.at_s = until

    def finish(self, now: float) -> int:
        """End the tree that is finished now; returns its ticket."""
        self.go_on(now)
        self.progress, ticket = heapq.heappop(self.trees)
        return ticket

    def next_s(self) -> float:
        """When its next tree is finished."""
        left = self.trees[0][0] - self.progress
        return self.at_s + left * max(len(self.trees), self.fill) / self.rate


_UPDATED, _SERVED = -1, -2
"""Events of the learner, where those of trees have the number of their engine."""


class Simulation:
    """A run of which nothing is made but the times.

    Args:
        measured: Of the real one.
        num_engines: That share its trees.
        trees_per_step: Trees of a learner step.
        max_staleness: As of the gate.
    """

    def __init__(
        self, *, measured: Measured, num_engines: int, trees_per_step: int, max_staleness: int
    ) -> None:
        self.measured, self.size, self.max_staleness = measured, trees_per_step, max_staleness
        # So many trees fill an engine: then each is as fast as one that is alone.
        fill = measured.engine_rate * measured.tree_s / float(np.mean(measured.tree_tokens))
        rate = measured.engine_rate
        self.engines = [_Engine(rate=rate, fill=max(fill, 1.0)) for _ in range(num_engines)]
        self.tokens = np.random.default_rng(0).choice(measured.tree_tokens, 2**14).tolist()
        self.events: list[tuple[float, int, int]] = []
        """Time, engine or kind, and `changes` of the engine."""
        self.unfinished: dict[int, int] = {}
        """Trees by learner step."""
        self.version_at: dict[int, int] = {}
        """Version that the engines served when a tree began."""
        self.ages: list[int] = []
        self.issued = self.updated = self.served = 0
        self.served_s = 0.0
        self.is_updating = False

    def run(self, num_steps: int = NUM_STEPS) -> Pace:
        """Simulate so many learner steps."""
        marks: list[tuple[float, float]] = []
        self._issue(0.0)
        while self.updated < num_steps:
            now, kind, changes = heapq.heappop(self.events)
            if kind == _UPDATED:
                self._end_update(now)
                marks.append((now, sum(engine.busy_s for engine in self.engines)))
            elif kind == _SERVED:
                self.served += 1
                self._issue(now)
                self._begin_update(now)
            elif self.engines[kind].changes == changes:
                ticket = self.engines[kind].finish(now)
                self.unfinished[ticket // self.size] -= 1
                self._foresee(kind)
                self._begin_update(now)
        first = num_steps // 4
        steps = num_steps - 1 - first
        spent, busy = (last - before for last, before in zip(marks[-1], marks[first], strict=True))
        return Pace(
            num_engines=len(self.engines),
            step_s=spent / steps,
            idle_engines=1 - busy / (spent * len(self.engines)),
            idle_learner=1 - steps * self.measured.update_s / spent,
            staleness=float(np.mean(self.ages[first * self.size :])),
        )

    def _issue(self, now: float) -> None:
        """Begin all trees that the gate lets out, each on the engine that has the fewest."""
        order = [(len(engine.trees), number) for number, engine in enumerate(self.engines)]
        heapq.heapify(order)
        changed = set()
        while self.issued < self.size * (self.served + 1 + self.max_staleness):
            count, number = heapq.heappop(order)
            tokens = self.tokens[self.issued % len(self.tokens)]
            self.engines[number].add(now, self.issued, tokens)
            heapq.heappush(order, (count + 1, number))
            changed.add(number)
            step = self.issued // self.size
            self.unfinished[step] = self.unfinished.get(step, 0) + 1
            self.version_at[self.issued] = self.served
            self.issued += 1
        for number in sorted(changed):
            self._foresee(number)

    def _foresee(self, number: int) -> None:
        engine = self.engines[number]
        engine.changes += 1
        if engine.trees:
            heapq.heappush(self.events, (engine.next_s(), number, engine.changes))

    def _begin_update(self, now: float) -> None:
        """Begin the next update if the learner is free and has all of its trees."""
        may_go_on = self.updated - self.served < 1 + bool(self.max_staleness)
        if self.is_updating or not may_go_on or self.unfinished.get(self.updated, 1):
            return
        tickets = range(self.updated * self.size, (self.updated + 1) * self.size)
        self.ages += [self.updated - self.version_at.pop(ticket) for ticket in tickets]
        self.is_updating = True
        # A version is published once the one before is served.
        end = max(now + self.measured.update_s, self.served_s)
        heapq.heappush(self.events, (end, _UPDATED, 0))

    def _end_update(self, now: float) -> None:
        self.updated += 1
        self.is_updating = False
        self.served_s = now + self.measured.load_s
        for number, engine in enumerate(self.engines):
            engine.pause(now, self.served_s)
            self._foresee(number)
        heapq.heappush(self.events, (self.served_s, _SERVED, 0))
        if self.max_staleness:
            self._begin_update(now)


def sweep(measured: Measured, config: Config, counts: Sequence[int] = COUNTS) -> list[Pace]:
    """The run of `config` with so many engines each."""
    return [
        Simulation(
            measured=measured,
            num_engines=count,
            trees_per_step=config.gate.trees_per_step,
            max_staleness=config.gate.max_staleness,
        ).run()
        for count in counts
    ]


def enough(paces: Sequence[Pace]) -> Pace:
    """The fewest engines whose step is about as short as any number's."""
    best = min(pace.step_s for pace in paces)
    return next(pace for pace in paces if pace.step_s <= NEAR_BEST * best)


def measured_of(folder: RunFolder, num_engines: int) -> Measurement | None:
    """What the stages of a run took, from its rows and its newest saved trees; None: too few.

    Args:
        folder: Of the run.
        num_engines: That it had where its rows, of an earlier version, do not tell.
    """
    all_rows = [row for row in latest_rows(folder) if "time/update_s" in row][1:]
    all_rows = [
        row for row in all_rows if row.get("tokens/per_s", 0) > 0 and "idle/engines_share" in row
    ]
    if all_rows:
        num_engines = int(all_rows[-1].get(ENGINE_COUNT, num_engines))
    rows = [row for row in all_rows if row.get(ENGINE_COUNT, num_engines) == num_engines]
    steps = saved_trees.saved_steps(folder)
    if len(rows) < FEWEST_ROWS or not steps:
        return None
    tokens: list[float] = []
    grow_s: list[float] = []
    newest = (saved_trees.saved_files(folder, step) for step in steps[-TREE_STEPS:])
    for file in chain.from_iterable(newest):
        table = saved_trees.read_columns(folder, file, ("length", "grow_s"))
        tokens += [float(sum(lengths)) for lengths in table["length"].to_pylist()]
        grow_s += table["grow_s"].to_pylist()
    found = Measured(
        tree_tokens=tuple(tokens),
        engine_rate=_median([_rate(row) / num_engines for row in rows]),
        tree_s=min(grow_s),
        update_s=_median([row["time/update_s"] for row in rows]),
        load_s=_median([row["time/sync_s"] for row in rows]),
    )
    return Measurement(
        found=found,
        num_engines=num_engines,
        num_steps=len(rows),
        num_others=len(all_rows) - len(rows),
    )


def _rate(row: Row) -> float:
    """Tokens a second that all engines would sample if none were idle."""
    return row["tokens/per_s"] / max(1 - row["idle/engines_share"], 0.01)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def gpus_of(config: Config, num_engines: int) -> float:
    """GPUs, or CPUs where there are none, of so many engines and the learner's workers."""
    engine, learner = config.engine.resources, config.learner
    name = "GPU" if engine.get("GPU") else "CPU"
    own = learner.num_workers * learner.resources.get(name, 0.0)
    return num_engines * engine.get(name, 0.0) + own


def table(paces: Sequence[Pace], config: Config) -> rich.table.Table:
    """A row for each number of engines."""
    unit = "GPU" if config.engine.resources.get("GPU") else "CPU"
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    titles = ("engines", f"{unit}s", "step", "engines idle", "learner idle", "staleness")
    for title in (*titles, f"{unit} s a step"):
        shown.add_column(title, justify="right")
    for pace in paces:
        units = gpus_of(config, pace.num_engines)
        shown.add_row(
            f"{pace.num_engines:,}",
            f"{units:,g}",
            f"{pace.step_s:.3g} s",
            f"{pace.idle_engines:.0%}",
            f"{pace.idle_learner:.0%}",
            f"{pace.staleness:.2f}",
            f"{units * pace.step_s:,.3g}",
        )
    return shown


def lines(config: Config, folder: RunFolder) -> Iterator[str]:
    """What a plan says of the pace of a run that has made some steps; else nothing."""
    if not folder.exists(CONFIG_FILE):
        return
    last_start = flat_settings(folder.read_text(CONFIG_FILE))
    num_engines = last_start.get("engine.num_engines", config.engine.num_engines)
    assert isinstance(num_engines, int)
    measured = measured_of(folder, num_engines)
    if measured is None:
        return
    most = config.engine.most
    counts = sorted({*(count for count in COUNTS if count <= max(16, most)), most})
    paces = {pace.num_engines: pace for pace in sweep(measured.found, config, counts)}
    own, best = paces[most], enough(list(paces.values()))
    yield (
        f"{own.step_s:.3g} s a step with {most} engine{'s' * (most > 1)}, by its steps so far: "
        f"engines idle {own.idle_engines:.0%}, learner {own.idle_learner:.0%} of the time; "
        f"more than {best.num_engines} would bring less than 5 %"
    )


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command(show, arguments)


def show(arguments: list[str]) -> int:
    """Print the table of a run."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    place = run_at(arguments[0])
    folder = RunFolder(place)
    with TemporaryDirectory() as copy:
        config = load([str(folder.fetch(CONFIG_FILE, Path(copy)))])
    if (measured := measured_of(folder, config.engine.num_engines)) is None:
        raise ValueError(
            f"{place} has fewer than {FEWEST_ROWS + 1} learner steps with as many engines as in "
            "its last one, or no saved trees (metrics.save_trees_every), and so no pace"
        )
    found = measured.found
    paces = sweep(found, config)
    console = rich.console.Console(markup=False, highlight=False)
    others = f" ({measured.num_others} with others left out)" if measured.num_others else ""
    console.print(
        f"{place}: {config.gate.trees_per_step} trees a step, staleness at most "
        f"{config.gate.max_staleness}; measured over {measured.num_steps} steps with "
        f"{measured.num_engines} engine(s){others}: "
        f"{found.engine_rate:,.0f} tokens a second of an engine, a tree of "
        f"{np.mean(found.tree_tokens):,.0f} tokens in {found.tree_s:.2g} s at best, "
        f"{found.update_s:.3g} s an update, {found.load_s:.3g} s until it is served",
        table(paces, config),
        f"enough: {enough(paces).num_engines} (more bring less than 5 %)",
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
