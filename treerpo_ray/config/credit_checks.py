"""Credit checks: whether some step of every tree that may be grown would be trained."""

from treerpo_ray.algo.advantages.forms import WITHOUT_SIBLINGS, AdvantageForm
from treerpo_ray.algo.forks.adaptive_shape import measured_cuts
from treerpo_ray.config.sections import GateConfig, LearnerConfig, TreeConfig


def check_credit(learner: LearnerConfig, tree: TreeConfig, gate: GateConfig) -> None:
    """Refuse single answers of which no step would ever be trained, a share that no form takes, a
    weight of lengths that nothing is compared with and a shape with nothing to be chosen by.

    Raises:
        ValueError: one line that names the keys.
    """
    is_shrunk = learner.advantage is AdvantageForm.SHRUNK_BASELINE
    if learner.baseline_share != 1 and not is_shrunk:
        raise ValueError(
            f"learner.baseline_share={learner.baseline_share:g} is of "
            "learner.advantage=shrunk_baseline alone: set that, or leave it at 1"
        )
    if tree.adaptive:
        _check_measuring(learner, tree, gate)
        _check_single_answers(learner, "a single answer of tree.adaptive=true")
    elif set(tree.num_children) == {1}:
        _check_single_answers(learner, f"tree.num_children={list(tree.num_children)}")


def _check_measuring(learner: LearnerConfig, tree: TreeConfig, gate: GateConfig) -> None:
    """Check that forks are measured, and that there is one to choose."""
    if not measured_cuts(tree.num_children):
        raise ValueError(
            f"tree.adaptive=true measures forks behind a first step, of which tree.num_children="
            f"{list(tree.num_children)} has none: set it to [1, 4] for example"
        )
    if learner.fork_every < 2:
        when = "in every step" if learner.fork_every else "in none"
        raise ValueError(
            f"learner.fork_every={learner.fork_every} measures {when}, and tree.adaptive=true "
            "chooses for the steps between: set it to 10 for example"
        )
    if gate.trees_per_step < 2:
        raise ValueError(
            f"gate.trees_per_step={gate.trees_per_step} gives tree.adaptive=true no two trees of a "
            "learner step to compare: set it to 8 or more"
        )


def _check_single_answers(learner: LearnerConfig, told: str) -> None:
    """Check that single answers, which `told` says there are, are trained."""
    if learner.length_weight:
        raise ValueError(
            f"learner.length_weight={learner.length_weight:g} compares right siblings, of "
            f"which {told} has none: set it to 0"
        )
    form = learner.advantage
    if isinstance(form, AdvantageForm) and form not in WITHOUT_SIBLINGS:
        raise ValueError(
            f"learner.advantage={form.value} compares siblings, of which {told} has none: set it "
            "to reward, past_baseline or shrunk_baseline (conf/methods/raft.yaml, "
            "conf/methods/reinforce.yaml, conf/methods/shrunk_baseline.yaml)"
        )
    if learner.leaves_out_alike:
        raise ValueError(
            f"learner.prune={learner.prune} with learner.prune_threshold="
            f"{learner.prune_threshold:g} leaves nothing to train of {told}: set them to "
            "range and -1"
        )
