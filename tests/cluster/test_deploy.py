"""The files of cluster/deploy against the schemas of what reads them, and against one another."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from calibprune import __version__, storage
from calibprune.config.load import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
SCHEMAS = Path(__file__).with_name("schemas")
BIN = Path(sys.executable).parent
KUBERAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))
KUBERNETES = "1.32"
COMMAND = re.compile(r"calibprune run (configs/\S+\.yaml) output=(s3://[\w./-]+)")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def pinned() -> dict[str, str]:
    """Returns the versions in constraints.txt, by package."""
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {one.name: str(one.specifier).removeprefix("==") for one in requirements}


def ray_cluster(document: dict) -> dict:
    return document["spec"].get("rayClusterSpec", document["spec"])


def groups(document: dict) -> list[dict]:
    cluster = ray_cluster(document)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def check_kuberay(document: dict) -> None:
    """Raises a ValidationError for what KubeRay or Kubernetes would refuse or silently drop."""
    jsonschema.validate(document, json.loads((SCHEMAS / "kuberay.json").read_text()))
    for group in groups(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | group["template"]
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def check_launcher(document: dict) -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(document, json.loads(schema.read_text()))


def check_skypilot(document: dict) -> None:
    jsonschema.validate(document, json.loads((SCHEMAS / "skypilot-task.json").read_text()))


# -- every file against what reads it ---------------------------------------------------------------


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_accepts(path):
    check_kuberay(read(path))


def test_cluster_launcher_accepts():
    check_launcher(read(DEPLOY / "cluster-launcher.yaml"))


def test_only_the_head_has_a_role_that_starts_machines():
    """Ray makes no role where the head has a profile, and starts the workers with the head's."""
    kinds = read(DEPLOY / "cluster-launcher.yaml")["available_node_types"]
    profiles = [kinds[name]["node_config"]["IamInstanceProfile"]["Name"] for name in kinds]
    assert len(set(profiles)) == len(profiles) == 2
    text = (DEPLOY / "cluster-launcher.yaml").read_text()
    for needed in ("RunInstances", "TerminateInstances", "CreateTags", "Describe*", "iam:PassRole"):
        assert needed in text
    assert "pip install boto3" in text


def test_skypilot_accepts():
    check_skypilot(read(DEPLOY / "skypilot.yaml"))


@pytest.mark.parametrize(
    ("check", "file", "path", "value"),
    [
        (check_kuberay, "kuberay/rayjob-8b.yaml", ["spec", "backOffLimit"], 3),
        (check_kuberay, "kuberay/rayjob-8b.yaml", ["spec", "submissionMode"], "HttpMode"),
        (check_kuberay, "kuberay/rayjob-8b.yaml", ["metadata", "name"], "8b"),
        (
            check_kuberay,
            "kuberay/rayjob-70b.yaml",
            ["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"],
            0,
        ),
        (
            check_kuberay,
            "kuberay/raycluster.yaml",
            ["spec", "workerGroupSpecs", 0, "template", "spec", "toleration"],
            [],
        ),
        (
            check_kuberay,
            "kuberay/raycluster.yaml",
            ["spec", "headGroupSpec", "template", "spec", "containers", 0, "envFrom", 0, "secret"],
            {},
        ),
        (check_launcher, "cluster-launcher.yaml", ["idle_timeout"], 5),
        (
            check_launcher,
            "cluster-launcher.yaml",
            ["available_node_types", "gpu", "resources"],
            {"GPU": "one"},
        ),
        (check_skypilot, "skypilot.yaml", ["resources", "spot"], True),
        (check_skypilot, "skypilot.yaml", ["resources", "job_recovery", "max_restarts"], 5),
    ],
)
def test_schemas_refuse_what_is_misspelt(check, file, path, value):
    document = deepcopy(read(DEPLOY / file))
    *inside, last = path
    part = document
    for key in inside:
        part = part[key]
    part[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(document)


def test_launcher_adds_no_commands_of_its_own():
    """Ray fills what is left out with defaults, among them a pip install of a nightly Ray."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(DEPLOY / "cluster-launcher.yaml"))
    validate_config(config)
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[name] == []
    assert not re.search(r"pip install|nightly|latest", json.dumps(config))


def test_dockerfile_passes_hadolint():
    done = subprocess.run(
        [BIN / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["slurm.sbatch", "skypilot setup", "skypilot run"])
def test_scripts_pass_shellcheck(script, tmp_path):
    if script == "slurm.sbatch":
        path = DEPLOY / script
    else:
        path = tmp_path / "script.sh"
        path.write_text(read(DEPLOY / "skypilot.yaml")[script.split()[1]])
    # excluded: an environment's activate script, which does not exist here
    command = [BIN / "shellcheck", "--shell=bash", "--exclude=SC1090,SC1091", path]
    for check in (["bash", "-n", path], command):
        done = subprocess.run(check, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# -- all of them together ---------------------------------------------------------------------------


def slurm_command() -> str:
    """Returns the command that the script runs, as bash parses it."""
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    wanted = [line for line in lines if re.match(r"(config|output|run)=", line)]
    script = "\n".join([*wanted, 'echo "${run[*]}"'])
    return subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, check=True
    ).stdout.strip()


def commands() -> dict[str, str]:
    """Returns each file's command: the one that it runs or, for a cluster that stays, the one in its comments."""
    found = {"slurm.sbatch": slurm_command()}
    for path in (*KUBERAY, DEPLOY / "cluster-launcher.yaml", DEPLOY / "skypilot.yaml"):
        lines = [
            line.strip(' #"').removeprefix("entrypoint: ")
            for line in path.read_text().splitlines()
            if "calibprune run " in line and "mine.yaml" not in line
        ]
        assert len(lines) == 1, path.name
        found[path.name] = lines[0]
    return found


def test_all_run_the_same_command():
    found = commands()
    assert len(found) == 6
    for name, command in found.items():
        match = COMMAND.fullmatch(command)
        assert match, f"{name}: {command}"
        config, output = match.groups()
        settings = load_config(str(ROOT / config), [f"output={output}"])
        assert settings.output == output
        assert storage.is_local(output) is False  # a retry lands on other machines
    text = (DEPLOY / "Dockerfile").read_text()
    assert 'CMD ["calibprune"' in text


def test_ray_versions_agree():
    versions = pinned()
    for path in KUBERAY:
        assert ray_cluster(read(path))["rayVersion"] == versions["ray"]
    assert versions["ray"] == ray.__version__  # what the tests run with


def test_all_that_pyproject_wants_is_pinned_in_its_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    versions = pinned()
    for one in map(Requirement, wanted):
        assert Version(versions[canonicalize_name(one.name)]) in one.specifier, one.name
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert "--constraint cluster/deploy/constraints.txt" in dockerfile
    assert "--constraint cluster/deploy/constraints.txt" in read(DEPLOY / "skypilot.yaml")["setup"]
    assert re.search(r"^FROM nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24.04$", dockerfile, re.M)


def test_one_image_of_this_version():
    image = f"registry.example.com/calibprune:{__version__}"
    documents = [read(path) for path in KUBERAY]
    found = {
        container["image"]
        for document in documents
        for group in groups(document)
        for container in group["template"]["spec"]["containers"]
    }
    found.add(read(DEPLOY / "cluster-launcher.yaml")["docker"]["image"])
    assert found == {image}
    assert image in (DEPLOY / "Dockerfile").read_text()


# -- what must survive edits ----------------------- -------------------------------------------------


def test_the_image_holds_what_a_run_needs_and_no_secrets():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = {
        name
        for line in re.findall(r"^COPY .*", dockerfile, re.M)
        for name in shlex.split(line)[1:-1]
        if not name.startswith("--")
    }
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert {name.split("/")[0] for name in copied} == kept
    assert all((ROOT / name).exists() for name in copied)
    users = re.findall(r"^USER (\S+)", dockerfile, re.M)
    assert users == ["1000"]
    assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)\w*[= ]", dockerfile)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_pods(path):
    document = read(path)
    assert ray_cluster(document)["authOptions"] == {"mode": "token"}
    head, *workers = groups(document)
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in (head, *workers):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        resources = container["resources"]
        gpus = int(resources["limits"].get("nvidia.com/gpu", 0))
        assert bool(gpus) == (group is not head)
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000  # the image's
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert [one["secretRef"]["name"] for one in container["envFrom"]] == [
            "calibprune-credentials"
        ]
        assert "env" not in container  # no credentials in the file
        if group is not head:
            assert any(one["key"] == "nvidia.com/gpu" for one in spec["tolerations"])
            assert resources["requests"] == resources["limits"]


@pytest.mark.parametrize("name", ["rayjob-8b", "rayjob-70b"])
def test_ray_jobs_are_tried_again_and_fit_their_run(name):
    document = read(DEPLOY / "kuberay" / f"{name}.yaml")
    spec = document["spec"]
    assert spec["backoffLimit"] >= 3
    assert spec["shutdownAfterJobFinishes"] is True
    assert not {"activeDeadlineSeconds", "entrypointNumGpus"} & spec.keys()
    match = COMMAND.fullmatch(spec["entrypoint"])
    assert match
    settings = load_config(str(ROOT / match[1]))
    (group,) = ray_cluster(document)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    pods, gpus, cpus = group["replicas"], int(limits["nvidia.com/gpu"]), int(limits["cpu"])
    generate, cluster = settings.generate, settings.cluster
    assert gpus >= generate.tensor_parallel
    engines = generate.engines or cluster.workers // generate.tensor_parallel
    assert pods * (gpus // generate.tensor_parallel) >= engines > 0
    assert pods * gpus >= cluster.workers
    assert cpus >= gpus * (cluster.cpus_per_worker or 1)


def test_nothing_but_the_launcher_itself_stops_rays():
    """`ray stop` stops every Ray of the user on the machine: SkyPilot's own, on a shared machine another's."""
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "cluster-launcher.yaml":
            lines = path.read_text().splitlines()
            assert not [
                line for line in lines if "ray stop" in line and not line.strip().startswith("#")
            ]


def test_slurm_script_resumes_by_itself():
    text = (DEPLOY / "slurm.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH ")
    )
    assert {"requeue", "exclusive"} <= options.keys()
    assert options["ntasks-per-node"] == "1"
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])
    settings = load_config(str(ROOT / slurm_command().split()[2]))
    assert int(options["nodes"]) * int(options["gpus-per-node"]) >= settings.cluster.workers
    assert int(options["gpus-per-node"]) >= settings.generate.tensor_parallel
