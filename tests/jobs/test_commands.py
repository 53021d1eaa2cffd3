"""The commands that the project writes down; `python -m tests.every_command` runs them."""

from tests.every_command import KINDS, Home, configuration, written_commands
from tests.support.project import PROJECT
from treerpo_ray.config.files import to_yaml


def test_of_every_written_command_it_is_said_what_it_must_do_or_which_test_runs_it() -> None:
    commands = written_commands()
    assert len(commands) > 60
    assert [each for each in commands if each.covering is None and each.kind is None] == []
    for test in {each.covering for each in commands if each.covering}:
        assert (PROJECT / test).exists(), test
    assert all(hasattr(Home, kind) for kind in KINDS.values())


def test_no_training_answers_for_another() -> None:
    """Those whose folder is the same are the same run."""
    runs: dict[str, str] = {}
    trainings = [each for each in written_commands() if each.covering is None]
    for command in [each for each in trainings if each.kind == "train"]:
        config = configuration(command.words)
        assert runs.setdefault(config.folder, to_yaml(config)) == to_yaml(config), command
    assert len(runs) > 12
