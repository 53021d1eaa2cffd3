"""Which curves of a run are drawn."""

from treerpo_ray.study.panels import PANELS, panels_of
from treerpo_ray.study.plots import LINES, WIDTHS


def titles(**metrics):
    return [
        panel.title for panel in panels_of({k.replace("_", "/", 1): v for k, v in metrics.items()})
    ]


def test_what_a_run_has_switched_off_has_no_panel_and_what_is_none_of_many_has_one():
    off = titles(loss_kl=[0.0, 0.0], staleness_mean=[0.0, None], staleness_max=[0.0, None])
    assert off == []
    assert titles(loss_kl=[None, 0.0, 1e-9]) == ["KL to the reference (nats a token)"]
    assert titles(staleness_mean=[0.0], staleness_max=[1.0]) == ["staleness (steps)"]
    assert titles(groups_kept_share=[0.0, 0.0]) == ["step groups kept"]  # nothing is learned


def test_no_panel_has_more_lines_than_there_are_colours():
    assert max(len(panel.lines) for panel in PANELS) <= min(len(LINES), len(WIDTHS))
