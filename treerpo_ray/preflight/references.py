"""References: whether the answers of a data set are answers by the run's verifier.

A reference that is none, such as a solution in prose, gives every text the reward 0 for ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treerpo_ray.config.data import DataConfig
from treerpo_ray.config.verifier import VerifierConfig
from treerpo_ray.prompts.problems import QUICKSTART, Problem
from treerpo_ray.scoring import make_verifiers
from treerpo_ray.verifier.verifier import Verifier

SAMPLE = 500
"""Problems of a data set that are looked at, evenly spread over it."""
NUM_NAMED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """The references of a data set that were looked at."""

    path: str
    num_looked_at: int
    no_answers: tuple[str, ...]
    """Ids of the problems whose references are no answers; rows are named by number if by nothing
    else."""

    def __str__(self) -> str:
        named = ", ".join(self.no_answers[:NUM_NAMED])
        more = len(self.no_answers) - NUM_NAMED
        return (
            f"{self.path}: {len(self.no_answers)} of {self.num_looked_at} references looked at are "
            f"no answers, so that nothing is right: rows {named}"
            + (f" and {more} more" if more > 0 else "")
        )


def look_at_references(
    data: Mapping[str, tuple[DataConfig, Sequence[Problem]]], verifier: VerifierConfig
) -> dict[str, References]:
    """Look at a sample of each data set, by its section of the configuration.

    The embedded tasks are left out, as are the data of a verifier that cannot tell.

    Raises:
        ValueError: none of the references of a section is an answer, or the check cannot be used.
    """
    samples = {
        section: (config, _sample(problems))
        for section, (config, problems) in data.items()
        if not config.path.startswith(QUICKSTART)
    }
    if not samples:
        return {}
    with next(make_verifiers(verifier, num_workers=1)) as asked:  # the main check
        found = {
            section: _look(asked, config, problems)
            for section, (config, problems) in samples.items()
        }
    for section, references in found.items():
        if references.num_looked_at and len(references.no_answers) == references.num_looked_at:
            raise ValueError(
                f"{section}.path={references}; {section}.answer_column must name the column of "
                f"the answers, {section}.answer_mark what stands before them"
            )
    return found


def _sample(problems: Sequence[Problem]) -> list[Problem]:
    step = max(1, -(-len(problems) // SAMPLE))
    return list(problems[::step])


def _look(verifier: Verifier, config: DataConfig, problems: list[Problem]) -> References:
    told = verifier.has_answers([problem.answers for problem in problems])
    return References(
        path=config.path,
        num_looked_at=sum(has_answer is not None for has_answer in told),
        no_answers=tuple(
            problem.id
            for problem, has_answer in zip(problems, told, strict=True)
            if has_answer is False
        ),
    )
