"""Runner: trains the missing trials of a comparison, one after the other, on shared engines."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from treerpo_ray.config import Config
from treerpo_ray.driver.result import RunResult
from treerpo_ray.driver.run import KeptEngines, kept_engines, run
from treerpo_ray.driver.start import EarlierStarts, look_at_folder
from treerpo_ray.engine.types import EngineSetup
from treerpo_ray.errors import RunFailed
from treerpo_ray.evaluate.evaluation import Evaluation, save_evaluation
from treerpo_ray.metrics.console import Console
from treerpo_ray.preflight.inputs import Inputs, load_inputs
from treerpo_ray.preflight.machine import check_vllm
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.comparisons.comparison import (
    Result,
    Trial,
    read_results,
    result_of,
    write_result,
)


class Trials:
    """The trials of a comparison and the engines that they share.

    Args:
        configs: Their configurations, in the order in which they are run.
        folder: Where their results lie.
        run: Runs one of them on engines that are kept.
        kept_engines: Starts engines that several can be run on.
    """

    def __init__(
        self,
        *,
        configs: Mapping[Trial, Config],
        folder: Path,
        run: Callable[
            [Config, Inputs, EarlierStarts, Console, KeptEngines | None], RunResult
        ] = run,
        kept_engines: Callable[[Config], AbstractContextManager[KeptEngines]] = kept_engines,
    ) -> None:
        self.folder, self.configs = folder, configs
        self._run_on, self._kept_engines = run, kept_engines
        results = read_results(configs, folder)
        self._done = {result.trial for result in results}
        self._starts: dict[str, Evaluation] = {
            result.trial.setting: result.before for result in results
        }
        self._session = ExitStack()
        self._started: EngineSetup | None = None
        self._kept: KeptEngines | None = None

    def run(self) -> int:
        """Run what has no result yet; returns how many runs failed.

        Raises:
            ValueError: a configuration or the cluster does not do.
            KeyboardInterrupt: a run was stopped; it goes on when the comparison is run again.
        """
        num_failed = 0
        with self._session:
            for number, trial in enumerate(self.configs, 1):
                if trial in self._done:
                    continue
                try:
                    result = self._run(trial, f"run {number} of {len(self.configs)}")
                except RunFailed as error:
                    print(f"failed: {trial}: {error}", file=sys.stderr)
                    num_failed += 1
                    self._started = None  # whatever failed may have left its engines unwell
                    continue
                self._starts.setdefault(trial.setting, result.before)
                write_result(result, self.folder)
        return num_failed

    def _run(self, trial: Trial, title: str) -> Result:
        config = self.configs[trial]
        check_vllm(config)
        earlier, inputs = look_at_folder(config), load_inputs(config)
        console = Console()
        console.note(f"{title}: {trial.setting}, {trial.arm}, seed {trial.seed}")
        # The start is the same for all arms: it is evaluated once for each setting, before the
        # engines have served a run.
        if (start := self._starts.get(trial.setting)) is not None:
            save_evaluation(start, RunFolder(config.folder))
        setup = EngineSetup.of(config)
        if self._started is None or start is None or not self._started.can_serve(setup):
            self._restart(setup)
        if not self._run_on(config, inputs, earlier, console, self._kept).is_complete:
            raise KeyboardInterrupt
        return result_of(trial, config)

    def _restart(self, setup: EngineSetup) -> None:
        """Start engines that can serve this run and as many of the others as possible."""
        self._session.close()
        able = [
            config for config in self.configs.values() if EngineSetup.of(config).can_serve(setup)
        ]
        most = max(able, key=lambda config: config.max_model_tokens)
        self._started = EngineSetup.of(most)
        self._kept = self._session.enter_context(self._kept_engines(most))
