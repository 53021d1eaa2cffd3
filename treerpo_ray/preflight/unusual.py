"""Unusual: settings that no rule forbids and that are hardly ever meant, a line each."""

from collections.abc import Iterator
from operator import attrgetter

from treerpo_ray.algo.advantages.forms import WITHOUT_SIBLINGS
from treerpo_ray.algo.forks.adaptive_shape import FEWEST_MEASURED
from treerpo_ray.algo.groups import PruneRule
from treerpo_ray.algo.loss_config import Ratio
from treerpo_ray.config import Config
from treerpo_ray.config.sections import ModelConfig
from treerpo_ray.preflight.inputs import training_sections
from treerpo_ray.prompts.problems import QUICKSTART

USUAL = {
    "learner.learning_rate": (1e-7, 2e-3),
    "learner.weight_decay": (0.0, 0.3),
    "learner.clip_grad_norm": (0.01, 100.0),
    "loss.kl_coef": (0.0, 0.2),
    "loss.entropy_coef": (0.0, 0.05),
    "tree.temperature": (0.3, 1.5),
    "evaluate.temperature": (0.0, 1.5),
}
"""Lowest and highest value that methods and models are trained with, by key."""
ADAPTER_RATES = (1e-6, 2e-2)
"""Usual learning rates of LoRA's adapters."""
USUAL_CLIP = {Ratio.TOKEN: (0.05, 0.5), Ratio.SEQUENCE: (1e-5, 0.05)}
"""Of `loss.clip_low` and `loss.clip_high`, by what the ratio is taken of."""


def unusual(config: Config) -> Iterator[str]:
    """A line for each setting that is out of its usual range, or lets nothing be learned."""
    clip = USUAL_CLIP[config.loss.ratio]
    usual = USUAL | {"loss.clip_low": clip, "loss.clip_high": clip}
    if config.lora.rank:
        usual["learner.learning_rate"] = ADAPTER_RATES
    for key, (low, high) in usual.items():
        value = attrgetter(key)(config)
        if not low <= value <= high:
            yield f"{key}={value:g}: usual are {low:g} to {high:g}"
    yield from _foreign_task(config)
    yield from _foreign_evaluation(config)
    learner, run = config.learner, config.run
    is_share = isinstance(learner.prune, PruneRule) and learner.prune is not PruneRule.SIGNIFICANCE
    if is_share and learner.prune_threshold >= 1:
        yield (
            f"learner.prune_threshold={learner.prune_threshold:g}: with learner.prune="
            f"{learner.prune} nothing is above 1, so nothing would be trained"
        )
    if learner.advantage in WITHOUT_SIBLINGS and learner.leaves_out_alike:
        yield (
            f"learner.prune={learner.prune} with learner.prune_threshold="
            f"{learner.prune_threshold:g}: siblings that are alike and only children are left out, "
            f"which learner.advantage={learner.advantage} trains as well; its gradient is biased "
            "so, and not with range and -1"
        )
    yield from _no_choice(config)
    num_updates = run.num_steps * learner.minibatches
    if learner.warmup_steps >= num_updates:
        yield (
            f"learner.warmup_steps={learner.warmup_steps}: the run has {num_updates} optimizer "
            "steps, and would never reach its learning rate"
        )


def _no_choice(config: Config) -> Iterator[str]:
    """Trees that measure forks for no others, or are too few to tell much of them."""
    if not config.tree.adaptive:
        return
    # Learner step 1 measures, and tickets of a step wait for that of max_staleness + 1 before.
    first = 2 + config.gate.max_staleness
    if first >= config.run.num_steps:
        yield (
            f"gate.max_staleness={config.gate.max_staleness}: with tree.adaptive=true the first "
            f"trees whose shape is chosen are those of learner step {first}, and the run has "
            f"{config.run.num_steps}"
        )
    if config.gate.trees_per_step < FEWEST_MEASURED:
        yield (
            f"gate.trees_per_step={config.gate.trees_per_step}: with tree.adaptive=true all trees "
            f"of a learner step that measures do so, and are fewer than {FEWEST_MEASURED}: shapes "
            "are chosen by little"
        )


def _foreign_task(config: Config) -> Iterator[str]:
    """Own data for the small model of the project, which knows its own tasks alone."""
    sets = [data.path for data in training_sections(config).values()]
    is_own = any(sets) and not any(path.startswith(QUICKSTART) for path in sets)
    if is_own and config.model.path == ModelConfig().path:
        yield (
            f"model.path={config.model.path}: the small model of the project knows its own tasks "
            "alone (quickstart:train); name one that can answer some of your questions"
        )


def _foreign_evaluation(config: Config) -> Iterator[str]:
    """Own data that is trained on beside the small task that a file of the project evaluates."""
    evaluated = config.evaluate.data.path
    sets = [data.path for data in training_sections(config).values()]
    if evaluated.startswith(QUICKSTART) and not any(path.startswith(QUICKSTART) for path in sets):
        yield (
            f"evaluate.data.path={evaluated}: evaluated is the small task, not what is trained on; "
            "name a file of your own, or '' for none"
        )
