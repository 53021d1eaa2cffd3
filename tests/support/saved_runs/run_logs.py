"""Run logs, and a W&B that goes wrong as it is told."""

import contextlib
import io
import threading
import types

from treerpo_ray.config import Config
from treerpo_ray.config.sections import MetricsConfig, RunConfig
from treerpo_ray.metrics.run_log import RunLog, RunLogSetup

COMMIT = "0a1b2c3"


def run_config(root, project=None):
    return Config(
        run=RunConfig(name="small", root=str(root)), metrics=MetricsConfig(wandb_project=project)
    )


def run_log_of(config, **settings):
    return RunLog(setup=RunLogSetup.of(config, commit=COMMIT), **settings)


def write(config, rows):
    run_log = run_log_of(config)
    for row in rows:
        run_log.step(row)
    run_log.close()


class FakeArtifact:
    """What was put into an artifact."""

    def __init__(self, name, type, metadata):
        self.name, self.type, self.metadata = name, type, metadata
        self.files, self.references, self.aliases = {}, {}, []

    @contextlib.contextmanager
    def new_file(self, name):
        file = io.StringIO()
        yield file
        self.files[name] = file.getvalue()

    def add_reference(self, uri, name, checksum):
        assert not checksum
        self.references[name] = uri


class FakeWandb(types.ModuleType):
    """Stands where `import wandb` finds it; `hold` makes its log call hang."""

    def __init__(self, has_key=True, error=None, error_online=None):
        super().__init__("wandb")
        self.has_key, self.error, self.error_online = has_key, error, error_online
        self.rows, self.settings, self.is_finished = [], {}, False
        self.hold, self.is_logging = threading.Event(), threading.Event()
        self.hold.set()
        self.axes, self.numbers, self.hidden = {}, [], set()
        self.logged, self.used = [], []

    def login(self, prompt, verify):
        assert not prompt
        return self.has_key

    def Settings(self, **settings):
        return settings

    def init(self, **settings):
        self.settings = settings
        if self.error:
            raise self.error
        if self.error_online and settings["mode"] != "offline":
            raise self.error_online
        return self

    def teardown(self):
        assert self.error or self.error_online

    def define_metric(self, name, step_metric=None, hidden=None):
        self.axes[name] = step_metric
        self.hidden |= {name} if hidden else set()

    def Table(self, columns, data):
        return columns, data

    def Html(self, page, inject):
        assert not inject
        return page

    def Artifact(self, name, type, metadata):
        return FakeArtifact(name, type, metadata)

    def use_artifact(self, artifact):
        self.used.append(artifact)

    def log_artifact(self, artifact, aliases):
        artifact.aliases = aliases
        self.logged.append(artifact)

    def log(self, row, step):
        self.is_logging.set()
        assert self.hold.wait(60)
        self.rows.append(row)
        self.numbers.append(step)

    @property
    def id(self):
        return self.settings["id"]

    @property
    def offline(self):
        return self.settings["mode"] == "offline"

    def finish(self):
        self.is_finished = True
