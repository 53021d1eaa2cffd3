"""Stage metrics: what Ray's endpoint shows of a run, and a dashboard that asks for just that."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.saved_runs.run_logs import COMMIT, run_config, run_log_of
from treerpo_ray.actor import make_actor
from treerpo_ray.metrics import stage_metrics
from treerpo_ray.metrics.events import NOTICES, Event
from treerpo_ray.metrics.run_log import RunLog, RunLogSetup
from treerpo_ray.metrics.stage_metrics import METRICS, NOTED, Kind, StageMetrics

DASHBOARD = Path(stage_metrics.__file__).with_name("grafana.json")
SUFFIXES = {
    Kind.GAUGE: ("",),
    Kind.COUNTER: ("_total",),
    Kind.HISTOGRAM: ("_bucket", "_count", "_sum"),
}
WAIT_S = 600.0
"""Time for what was recorded to come to the endpoint; Ray hands it on every 10 s."""


class Kept(dict):
    """Values by metric and tags: the last one of a gauge, else all of them."""

    def make(self, metric):
        def record(value, tags):
            assert set(tags) == set(metric.tags) and tags["run"] == "small"
            key = metric.name, tags[metric.tag] if metric.tag else ""
            self[key] = value if metric.kind is Kind.GAUGE else [*self.get(key, []), value]

        return record


POOL = {"serving": 2, "starting": 1, "draining": 0, "waiting": 3, "growing": 5, "nodes": 1}
EVENTS = (
    Event(kind="pool", fields=POOL),
    *(Event(kind="tree_finished", fields={"ticket": n, "engine": n % 2}) for n in range(3)),
    Event(kind="engine_lost", fields={"engine": 1, "reason": "it is gone"}),
    Event(kind="published", fields={"version": 4, "digest": "ab", "seconds": 0.25}),
    Event(kind="consumed", fields={"step": 0, "first": 0, "trees": 2, "version": 4}),
)
OF_ROWS = [source for metric in METRICS for source in metric.sources if "/" in source]
ROW = {"version": 5.0, **dict.fromkeys(OF_ROWS, 0.5), "step": 7.0}
"""Events and a row as a run has them."""


def test_a_metric_is_recorded_of_each_row_and_event_by_its_tag(tmp_path):
    kept = Kept()
    run_log = run_log_of(
        run_config(tmp_path), stage_metrics=StageMetrics(run="small", make=kept.make)
    )
    for event in EVENTS:
        run_log.event(event)
    run_log.step(ROW)
    shares = {stage: kept["treerpo_idle_share", stage] for stage in ("engines", "learner")}
    assert shares == {"engines": 0.5, "learner": 0.5}
    versions = [kept["treerpo_weights_version", stage] for stage in ("learner", "engines")]
    assert versions == [5, 4]
    assert kept["treerpo_finished_trees", "0"] == [1, 1] and kept["treerpo_finished_trees", "1"]
    assert kept["treerpo_trees", "waiting"] == 3 and kept["treerpo_engines", "draining"] == 0
    assert kept["treerpo_consumed_trees", ""] == [2] and kept["treerpo_publish_seconds", ""]
    assert kept["treerpo_events", "engine_lost"] == [1]


def test_trees_are_finished_until_the_step_that_consumes_them(tmp_path):
    kept, config = Kept(), run_config(tmp_path)
    run_log = run_log_of(config, stage_metrics=StageMetrics(run="small", make=kept.make))
    for ticket in range(config.gate.trees_per_step + 1):
        run_log.event(Event(kind="tree_finished", fields={"ticket": ticket, "engine": 0}))
    before = kept["treerpo_trees", "finished"]
    run_log.step({"step": 1})
    assert before == config.gate.trees_per_step + 1 and kept["treerpo_trees", "finished"] == 1


def test_what_is_not_finite_and_nothing_more_of_a_counter_is_left_out():
    kept = Kept()
    metrics = StageMetrics(run="small", make=kept.make)
    metrics.row({"step": float("nan"), "verdict/errored": 0.0, "reward/mean": 0.0})
    assert kept == {("treerpo_reward", ""): 0.0}


def test_what_fails_of_them_ends_them_and_not_the_run_log(tmp_path, caplog):
    def record(value, tags):
        raise RuntimeError("the agent is gone")

    metrics = StageMetrics(run="small", make=lambda metric: record)
    run_log = run_log_of(run_config(tmp_path), stage_metrics=metrics)
    run_log.step(ROW)
    run_log.event(EVENTS[0])
    assert len(run_log.rows_since(0)) == 1
    (line,) = [line.message for line in caplog.records]
    assert "the agent is gone" in line


def test_no_two_metrics_share_a_source_or_a_name():
    for names in (
        [source for metric in METRICS for source in metric.sources],
        [kind for metric in METRICS for kind in metric.counted],
        [metric.name for metric in METRICS],
    ):
        assert len(names) == len(set(names))


def test_what_is_counted_is_what_whoever_follows_the_run_sees():
    assert set(NOTED) <= NOTICES | {"autoscaler_failed"}


@pytest.mark.ray
def test_the_dashboard_asks_for_what_ray_exports_and_shows_all_of_it(ray_cluster, tmp_path):
    exported = exported_labels(run_config(tmp_path))
    own = {f"ray_{m.name}{end}" for m in METRICS for end in SUFFIXES[m.kind]}
    assert set(exported) == own
    shown = set()
    for panel in panels():
        for target in panel["targets"]:
            (name,) = names = set(re.findall(r"ray_\w+", target["expr"]))
            assert names <= own, f"{panel['title']}: {target['expr']}"
            asked = labels_asked(target)
            assert asked <= exported[name] | {"run"}, f"{panel['title']} asks for {asked}"
            shown.add(re.sub("_(total|bucket)$", "", name))
    assert shown == {f"ray_{metric.name}" for metric in METRICS}
    (variable,) = [v for v in dashboard()["templating"]["list"] if v["name"] == "run"]
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
    assert label in exported[name]


def test_panels_have_the_units_of_their_metrics():
    units = {f"ray_{metric.name}": metric for metric in METRICS}
    for panel in panels():
        for target in panel["targets"]:
            name = re.sub("_(total|bucket)$", "", re.findall(r"ray_\w+", target["expr"])[0])
            metric, unit = units[name], panel["fieldConfig"]["defaults"]["unit"]
            per_s = metric.kind is Kind.COUNTER and "rate(" in target["expr"]
            assert unit == (f"{metric.unit}/s" if per_s else metric.unit), panel["title"]


def test_no_two_panels_lie_over_each_other():
    taken = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def dashboard():
    return json.loads(DASHBOARD.read_text())


def panels():
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def labels_asked(target):
    """Names of the labels that a query selects and groups by, and those that its legend shows."""
    selected = re.findall(r"(\w+)=~?\"", target["expr"])
    grouped = [re.split(r", *", names) for names in re.findall(r"by \(([^)]*)\)", target["expr"])]
    legend = re.findall(r"{{(\w+)}}", target["legendFormat"])
    return {*selected, *legend, *(name for names in grouped for name in names)}


def exported_labels(config):
    """Labels by the name of each series of ours at the endpoint of Ray's node, once all are there
    that the actor of a run's log records."""
    import ray

    run_log = make_actor(RunLog)(setup=RunLogSetup.of(config, commit=COMMIT))
    ray.get([*(run_log.event.remote(event) for event in EVENTS), run_log.step.remote(ROW)])
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end, found = time.monotonic() + WAIT_S, {}
    wanted = {f"ray_{metric.name}" for metric in METRICS}
    while time.monotonic() < end and not wanted <= {re.sub("_total$", "", n) for n in found}:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                text = answer.read().decode()
        except OSError:  # what answers there is still starting
            continue
        families = list(text_string_to_metric_families(text))
        found = {family.name: family for family in families if "treerpo" in family.name}
    return {
        sample.name: set(sample.labels) for family in found.values() for sample in family.samples
    }
