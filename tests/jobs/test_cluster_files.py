"""The cluster files: against Ray's and KubeRay's schemas, and against the project's own config."""

import re
import shlex
import tomllib
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _generate_available_node_types_from_ray_cr_spec as node_types_of_kuberay,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from tests.support import kuberay_schema
from tests.support.project import PROJECT, load_script
from treerpo_ray.config import Config, load
from treerpo_ray.preflight.placement import missing_resources, needed_resources

FOLDER = PROJECT / "jobs/cluster"
DRAIN = "jobs/cluster/drain.py"
VM_FILES = ("aws.yaml", "gcp.yaml")
KUBERNETES_FILES = ("raycluster.yaml", "rayjob.yaml")
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
INSTRUCTION = re.compile(r"([A-Z]+) (.+)")


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


def kuberay_spec(name):
    spec = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def node_types(name):
    """Node types as Ray's autoscaler is going to see them: workers, resources and labels."""
    if name in VM_FILES:
        return prepare_config(read(name))["available_node_types"]
    return node_types_of_kuberay(kuberay_spec(name))


def commands(name):
    """The training commands in a file: the entrypoint, and what its comments tell to run."""
    text = (FOLDER / name).read_text()
    notes = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    notes = notes.replace("\\\n", " ")
    found = re.findall(r"python\s+\S+/jobs/train\.py[^'\n]*", notes)
    if name == "rayjob.yaml":
        found.append(read(name)["spec"]["entrypoint"])
    assert found
    return [shlex.split(command) for command in found]


def head_commands(text):
    """The commands at the head of a file, without the lines that continue them."""
    return re.findall(r"^#   (\w+ .+)$", text, re.MULTILINE)


def dockerfile():
    """Instructions of the Dockerfile with their arguments, continued lines joined."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    matches = [INSTRUCTION.fullmatch(line) for line in lines]
    assert all(matches)
    return [match.groups() for match in matches]


def image_folder():
    """Where the image holds the project."""
    return Path(next(value for name, value in dockerfile() if name == "WORKDIR"))


def config_of(command) -> Config:
    """The configuration of a command inside the image, from the same files in here."""
    assert command[0] == "python"
    here = [
        str(PROJECT / Path(word).relative_to(image_folder())) if word.startswith("/home/") else word
        for word in command[1:]
    ]
    script, *arguments = here
    assert Path(script).is_file()
    return load(arguments)


ALL = [*VM_FILES, *KUBERNETES_FILES]
IMAGE_DRAIN = str(image_folder() / DRAIN)


@pytest.mark.parametrize("name", VM_FILES)
def test_a_vm_file_is_what_ray_takes(name) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", VM_FILES)
def test_a_mistake_in_a_vm_file_is_found(name) -> None:
    config = read(name)
    config["available_node_types"]["train"]["resources"]["GPU"] = "one"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("raycluster.yaml", kuberay_schema.RAY_CLUSTER),
        ("rayjob.yaml", kuberay_schema.RAY_JOB),
    ],
)
def test_a_kuberay_file_has_only_documented_fields_and_names_its_version(name, schema) -> None:
    jsonschema.validate(read(name), schema)
    assert f"KubeRay {kuberay_schema.VERSION}" in (FOLDER / name).read_text()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read(name) | {"spec": {"entrypoint": "x", "workers": 1}}, schema)


def test_the_job_and_the_standing_cluster_are_the_same_cluster() -> None:
    assert kuberay_spec("rayjob.yaml") == kuberay_spec("raycluster.yaml")


@pytest.mark.parametrize("name", ALL)
def test_every_command_holds_a_configuration_that_the_cluster_can_reach(name) -> None:
    types = node_types(name)
    reach: dict[str, float] = {}
    for node in types.values():
        for resource, amount in node["resources"].items():
            reach[resource] = reach.get(resource, 0) + amount * node["max_workers"]
    for command in commands(name):
        config = config_of(command)
        assert missing_resources(needed_resources(config, config.engine.most), reach) == {}


def can_hold(node, resources) -> bool:
    return missing_resources(resources, node["resources"]) == {}


@pytest.mark.parametrize("name", ALL)
def test_each_role_fits_its_own_nodes_and_no_others(name) -> None:
    types = node_types(name)
    for command in commands(name):
        config = config_of(command)
        for resources, role in (
            (config.engine.resources, "rollout"),
            (config.learner.resources, "train"),
            (config.verifier.resources, "train"),
        ):
            fitting = {
                node["labels"]["role"] for node in types.values() if can_hold(node, resources)
            }
            assert fitting == {role}
        train, rollout = types["train"], types["rollout"]
        assert config.engine.labels and config.engine.labels.items() <= rollout["labels"].items()
        together = {
            key: config.learner.resources.get(key, 0) + config.verifier.resources.get(key, 0)
            for key in config.learner.resources | config.verifier.resources
        }
        assert can_hold(train, together)
        assert train["min_workers"] == train["max_workers"] == config.learner.num_workers
        # What a run waits for at its start is there from the start; the pool grows from it.
        assert config.engine.num_engines == rollout["min_workers"] < config.engine.most
        assert config.engine.most <= rollout["max_workers"]


GPUS = {"a100": 79, "h100": 79, "l4": 22}
"""GiB that PyTorch finds on a GPU."""
MACHINES = {
    "p5.4xlarge": (16, 256, "h100"),
    "g6.2xlarge": (8, 32, "l4"),
    "a2-ultragpu-1g": (12, 170, "a100"),
    "g2-standard-8": (8, 32, "l4"),
}
"""CPUs, GiB of main memory and GPU of a machine, as its cloud lists them."""
SELECTED = {"nvidia-a100-80gb": "a100", "nvidia-l4": "l4"}
"""GPU of the nodes with a label of GKE."""


def machine(name, role) -> tuple[float, float, str]:
    """CPUs, GiB of main memory and GPU of the nodes of a role."""
    if name in VM_FILES:
        found = node_types(name)[role]["node_config"]
        return MACHINES[found.get("InstanceType") or found["machineType"]]
    groups = kuberay_spec(name)["workerGroupSpecs"]
    [pod] = [group["template"]["spec"] for group in groups if group["groupName"] == role]
    limits = pod["containers"][0]["resources"]["limits"]
    gpu = SELECTED[pod["nodeSelector"]["cloud.google.com/gke-accelerator"]]
    return float(limits["cpu"]), float(limits["memory"].removesuffix("Gi")), gpu


@pytest.mark.parametrize("name", ALL)
def test_the_machines_hold_the_recipe_that_a_file_names(name) -> None:
    types = node_types(name)
    for command in commands(name):
        config = config_of(command)
        assert "1.5B" in config.model.path
        weights_gib = 2 * 1.5437e9 / 2**30
        for role, part in (("train", config.learner), ("rollout", config.engine)):
            cpus, main_gib, gpu = machine(name, role)
            assert types[role]["resources"]["CPU"] <= cpus
            assert part.gpu_memory_gib <= GPUS[gpu]
            # Ray's object store is 30 % of the memory: two versions and one that comes.
            assert 0.3 * main_gib > 3 * weights_gib
        # A worker loads the policy and the reference in main memory first, and its copies for the
        # engines are made there.
        assert 0.7 * machine(name, "train")[1] > (4 + 2 + 2) / 2 * weights_gib + 8


@pytest.mark.parametrize("name", ALL)
def test_the_head_does_no_work(name) -> None:
    [head] = [node for node in node_types(name).values() if node["labels"]["role"] == "head"]
    assert head["resources"].pop("CPU") == 0
    assert set(head["resources"]) <= {"memory"}


@pytest.mark.parametrize("name", ALL)
def test_five_commands_at_most_lead_from_nothing_to_a_running_job(name) -> None:
    image = head_commands((FOLDER / "Dockerfile").read_text())
    operator = ["helm install"] if name in KUBERNETES_FILES else []
    steps = [*image, *operator, *head_commands((FOLDER / name).read_text())]
    assert len(steps) <= 5
    if name == "rayjob.yaml":
        readme = (FOLDER / "README.md").read_text()
        assert all(step in readme for step in head_commands((FOLDER / name).read_text()))


@pytest.mark.parametrize("name", VM_FILES)
def test_a_vm_cluster_asks_for_the_token_and_shows_its_dashboard_to_the_head_alone(name) -> None:
    config = read(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    [start] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_a_kuberay_cluster_asks_for_the_token_and_scales_by_the_new_autoscaler(name) -> None:
    spec = kuberay_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", ALL)
def test_rollout_nodes_are_preemptible_and_train_nodes_are_not(name) -> None:
    if name in VM_FILES:
        groups = {key: node["node_config"] for key, node in node_types(name).items()}
    else:
        workers = kuberay_spec(name)["workerGroupSpecs"]
        groups = {group["groupName"]: group["template"]["spec"] for group in workers}
    marks = ("'MarketType': 'spot'", "'preemptible': True", "'cloud.google.com/gke-spot': 'true'")
    assert any(mark in str(groups["rollout"]) for mark in marks)
    assert not any(mark in str(groups["train"]) for mark in marks)


@pytest.mark.parametrize(("name", "cloud"), [("aws.yaml", "aws"), ("gcp.yaml", "gcp")])
def test_a_machine_listens_for_its_clouds_notice_once_ray_is_up(name, cloud) -> None:
    *_, start, listen = prepare_config(read(name))["worker_start_ray_commands"]
    assert "ray start" in start
    # In a session of its own and without the terminal, it outlives the shell that starts it.
    command, _, streams = listen.partition(" > ")
    assert shlex.split(command) == ["setsid", "--fork", "python", IMAGE_DRAIN, cloud]
    assert streams.endswith("2>&1 < /dev/null")


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_a_rollout_pod_is_drained_before_it_ends(name) -> None:
    for group in kuberay_spec(name)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        if group["groupName"] != "rollout":
            assert "lifecycle" not in container
            continue
        assert container["lifecycle"]["preStop"]["exec"]["command"] == [
            "python",
            IMAGE_DRAIN,
            "pod",
        ]
        # The hook's time counts, and Ray has to end within it too.
        assert pod["terminationGracePeriodSeconds"] >= load_script(DRAIN).NOTICE_S["pod"] + 10


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_every_pod_may_write_into_the_folder_of_the_runs(name) -> None:
    """The image's user is 1000 in group 100; a new volume is root's."""
    spec = kuberay_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        context = group["template"]["spec"]["securityContext"]
        assert context == {"fsGroup": 100, "fsGroupChangePolicy": "OnRootMismatch"}


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_every_pod_mounts_the_folder_of_the_runs(name) -> None:
    spec = kuberay_spec(name)
    claim = read("storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [volume] = pod["volumes"]
        [mount] = pod["containers"][0]["volumeMounts"]
        assert mount["name"] == volume["name"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for command in commands(name):
            assert config_of(command).run.root.startswith(mount["mountPath"])


@pytest.mark.parametrize(("name", "scheme"), [("aws.yaml", "s3://"), ("gcp.yaml", "gs://")])
def test_runs_on_machines_are_written_to_their_clouds_store(name, scheme) -> None:
    for command in commands(name):
        assert config_of(command).run.root.startswith(scheme)


def test_one_image_of_this_version_is_used_everywhere() -> None:
    images = {read(name)["docker"]["image"] for name in VM_FILES}
    for name in KUBERNETES_FILES:
        spec = kuberay_spec(name)
        groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        images |= {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    [image] = images
    assert image.endswith(f"/treerpo_ray:{METADATA['version']}-gpu")
    assert f"-t {image} ." in (FOLDER / "Dockerfile").read_text()


def test_the_image_has_the_pinned_ray_and_python_and_installs_the_project() -> None:
    [ray] = [need for need in METADATA["dependencies"] if need.startswith("ray[")]
    pinned = version("ray")
    assert ray.endswith(f"=={pinned.rpartition('.')[0]}.*")
    assert METADATA["requires-python"] == "==3.11.*"
    steps = dockerfile()
    assert steps[0] == ("FROM", f"rayproject/ray:{pinned}-py311")
    assert {name for name, _ in steps} <= {"FROM", "USER", "RUN", "WORKDIR", "COPY", "ENV"}
    for name in KUBERNETES_FILES:
        assert kuberay_spec(name)["rayVersion"] == pinned
    copied = [value.split()[1:-1] for name, value in steps if name == "COPY"]
    assert all((PROJECT / source).exists() for sources in copied for source in sources)
    extras = re.search(r'pip install --no-cache-dir "\.\[(.+)\]"', str(steps))[1].split(",")
    assert "gpu" in extras and set(extras) <= set(METADATA["optional-dependencies"])
    # Root installs what the system needs and nothing runs as root.
    assert [value for name, value in steps if name == "USER"] == ["root", "ray"]


def test_the_image_asks_the_nvidia_runtime_for_the_gpus_of_its_host() -> None:
    """Ray starts a container with `--runtime=nvidia` alone, and its base is an image for CPUs."""
    set_to = dict(
        pair.split("=") for name, value in dockerfile() if name == "ENV" for pair in value.split()
    )
    assert set_to["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {"compute", "utility"} <= set(set_to["NVIDIA_DRIVER_CAPABILITIES"].split(","))


def test_what_a_job_uploads_is_the_code_alone() -> None:
    environment = yaml.safe_load((PROJECT / "jobs/cluster/runtime_env.yaml").read_text())
    RuntimeEnv(env_vars=environment["env_vars"], excludes=environment["excludes"])
    sent: list[Path] = []
    excludes = [_get_excludes(PROJECT, environment["excludes"])]
    _dir_travel(PROJECT, excludes, sent.append, include_gitignore=True)
    files = [path.relative_to(PROJECT) for path in sent if path.is_file()]
    assert {path.parts[0] for path in files} <= {
        *("conf", "jobs", "treerpo_ray", "pyproject.toml", "README.md", ".gitignore"),
    }
    for needed in ("jobs/train.py", "conf/quickstart.yaml", "treerpo_ray/train.py"):
        assert Path(needed) in files
    sources = (PROJECT / "treerpo_ray").rglob("*.py")
    assert {path.relative_to(PROJECT) for path in sources} <= set(files), "else the job lacks some"
    assert any(path.match("treerpo_ray/quickstart/model/*.safetensors") for path in files)
    assert sum((PROJECT / path).stat().st_size for path in files) < 30 * 2**20
