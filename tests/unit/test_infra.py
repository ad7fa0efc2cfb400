"""The files in infra/ agree with the project; real parsers and schemas take them, of KubeRay one written by hand.

No container is started.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import click
import compose_spec
import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray.autoscaler._private.kuberay.utils import parse_quantity
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from sqlalchemy import make_url

from hyperlora import autoscaling, capacity, jobs
from hyperlora.config import RayConfig, StorageConfig, apply_overrides, parse, read_yaml
from pipelines.cli import parse_arguments
from pipelines.common import shipped

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PINS = dict(re.findall(r"^([a-z0-9_.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
COMPOSE_GPU = yaml.safe_load((INFRA / "compose.gpu.yaml").read_text())
KUBERAY = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((INFRA / "kuberay").glob("ray*.yaml"))}
SCHEMA = yaml.safe_load((ROOT / "tests/schemas/kuberay.yaml").read_text())
CLOUD = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
SECRET = r"[A-Z0-9_]*(?:KEY|SECRET|TOKEN|PASSWORD)[A-Z0-9_]*"


def filled(text: str, **given: str) -> str:
    """Compose's text with its variables filled in."""
    return re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}", lambda m: given.get(m[1]) or m[2] or "x", text)


def words(command: str) -> list[str]:
    return shlex.split(filled(command))


def cluster_spec(name: str) -> dict[str, Any]:
    spec = KUBERAY[name]["spec"]
    return spec if name == "raycluster" else spec["rayClusterSpec"]


def groups(name: str) -> list[dict[str, Any]]:
    return [cluster_spec(name)["headGroupSpec"], *cluster_spec(name)["workerGroupSpecs"]]


def compose(specification: dict[str, Any]) -> None:
    """Parse a compose file whose anchors are resolved.

    Raises:
        ValueError: the Compose specification does not allow it.
    """
    text = json.dumps({k: v for k, v in specification.items() if not k.startswith("x-")})
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(json.loads(filled(text)))).validate()


def test_the_compose_file_follows_the_specification() -> None:
    compose(COMPOSE)
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"]["head"]["healthchek"] = wrong["services"]["head"].pop("healthcheck")
    with pytest.raises(ValueError, match="healthchek"):
        compose(wrong)


def test_the_file_with_gpus_goes_over_the_other() -> None:
    compose(COMPOSE_GPU)
    for part in ("capabilities", "count"):
        wrong = copy.deepcopy(COMPOSE_GPU)
        (device,) = wrong["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
        device["x" + part] = device.pop(part)
        with pytest.raises(ValueError, match=part):
            compose(wrong)
    # It builds and starts what the README builds.
    readme = (INFRA / "README.md").read_text()
    (built,) = re.findall(r"docker build .* -t (\S+:cuda) --build-arg (TORCH_INDEX=\S+)", readme)
    for name, service in COMPOSE_GPU["services"].items():
        assert "ray start" in COMPOSE["services"][name]["command"]
        index = filled(service["build"]["args"]["TORCH_INDEX"])
        assert (filled(service["image"]), f"TORCH_INDEX={index}") == built
        assert set(service["build"]["args"]) <= set(COMPOSE["services"][name]["build"]["args"])
    # Two nodes that see the same GPUs would both offer them.
    (worker,) = (name for name, service in COMPOSE_GPU["services"].items() if "deploy" in service)
    (device,) = COMPOSE_GPU["services"][worker]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "--head" not in COMPOSE["services"][worker]["command"]
    (files,) = re.findall(r"docker compose ((?:--file \S+ )+)", (INFRA / "compose.gpu.yaml").read_text())
    assert files.split() == ["--file", "infra/compose.yaml", "--file", "infra/compose.gpu.yaml"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"HYPERLORA_IMAGE": "mine"},
        {"TORCH_INDEX": "https://mirror/cpu"},
        {"HYPERLORA_IMAGE_CUDA": "mine", "TORCH_INDEX_CUDA": "https://mirror/cu130"},
    ],
)
def test_no_two_images_have_one_name(given: dict[str, str]) -> None:
    built: dict[str, set[str]] = {}
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            over = COMPOSE_GPU["services"].get(name, {"build": {}})
            arguments = service["build"]["args"] | over["build"].get("args", {})
            image = filled((service | over)["image"], **given)
            built.setdefault(image, set()).add(filled(json.dumps(arguments), **given))
    assert {image: len(of) for image, of in built.items()} == dict.fromkeys(built, 1)
    indices = {image: json.loads(*of)["TORCH_INDEX"] for image, of in built.items()}
    assert sorted(url.rpartition("/")[2] for url in indices.values()) == ["cpu", "cu130"]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_its_manifests(name: str) -> None:
    jsonschema.validate(KUBERAY[name], SCHEMA)
    whole = cluster_spec(name)
    for part, key, value, told in [
        (whole["workerGroupSpecs"][0]["rayStartParams"], "num-gpus", 1, "1 is not of type 'string'"),
        (whole["workerGroupSpecs"][0], "maxReplicas", None, "None is not of type 'integer'"),
        (whole["headGroupSpec"]["template"], "metadata", {"label": {}}, "'label' was unexpected"),
        (whole, "authOptions", {"mode": "Token"}, "'Token' is not one of"),
        (whole, "gcsFaultToleranceOptions", {}, "'redisAddress' is a required property"),
        (whole, "autoscalerOption", {}, "'autoscalerOption' was unexpected"),
    ]:
        with mock.patch.dict(part, {key: value}), pytest.raises(jsonschema.ValidationError, match=told):
            jsonschema.validate(KUBERAY[name], SCHEMA)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activeDeadlineSeconds", 2**31),
        ("deletionStrategy", {"onSuccess": {"policy": "DeleteCluster"}}),
        ("deletionStrategy", {"onSuccess": {"policy": "DeleteAll"}, "onFailure": {"policy": "DeleteNone"}}),
        ("submissionMode", "K8SJobMode"),
        ("entrypointNumCpus", "1"),
    ],
)
def test_kuberay_refuses_what_a_job_cannot_have(key: str, value: Any) -> None:
    job = KUBERAY["rayjob"]
    with mock.patch.dict(job["spec"], {key: value}), pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def test_the_schema_is_of_the_oldest_operator_that_is_allowed() -> None:
    told = [f.read_text() for f in (ROOT / "tests/schemas/kuberay.yaml", INFRA / "README.md")]
    told += [(INFRA / f"kuberay/{name}.yaml").read_text() for name in KUBERAY]
    assert [set(re.findall(r"KubeRay (?:operator, )?(\d\S+?)[, ]", text)) for text in told] == [{"1.5.1"}] * len(told)


def test_a_job_that_is_stopped_has_time_for_its_checkpoint() -> None:
    spec = KUBERAY["rayjob"]["spec"]
    submitted = jobs._runtime(jobs.Job(words=(), files={}), ROOT)["env_vars"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": submitted}
    assert submitted["RAY_JOB_STOP_WAIT_TIME_S"] == str(jobs.STOP_SECONDS)
    assert StorageConfig().final_retry_seconds + 60 < jobs.STOP_SECONDS, "a store that is away would end in a kill"
    # The same when RayJob or RayCluster is deleted: the pods are drained for as long, and killed later.
    for group in [*groups("rayjob"), *groups("raycluster")]:
        pod = group["template"]["spec"]
        env = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
        assert env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(jobs.STOP_SECONDS)
        assert pod["terminationGracePeriodSeconds"] > jobs.STOP_SECONDS
    # And when compose stops its containers.
    for service in COMPOSE["services"].values():
        if "ray start" in str(service.get("command")):
            assert service["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(jobs.STOP_SECONDS)
            assert int(service["stop_grace_period"].removesuffix("s")) > jobs.STOP_SECONDS
    assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S > 0, "Ray knows the variable"


@pytest.mark.parametrize("name", KUBERAY)
def test_the_operator_gives_everybody_the_token(name: str) -> None:
    """The autoscaler beside the head, the pod that submits a RayJob, and the operator need it as well as the nodes."""
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}
    # What a container sets itself, the operator leaves alone.
    assert "RAY_AUTH" not in json.dumps(KUBERAY[name])


def test_commands_name_what_the_manifests_make() -> None:
    told = (INFRA / "kuberay/raycluster.yaml").read_text() + (INFRA / "README.md").read_text()
    name = KUBERAY["raycluster"]["metadata"]["name"]
    assert set(re.findall(r"service/(\S+)-head-svc", told)) == {name}
    assert set(re.findall(r"kubectl get secret (\S+)", told)) == {name}  # the operator's, with the token
    secrets = {
        source["secretRef"]["name"]
        for manifest in KUBERAY
        for group in groups(manifest)
        for source in group["template"]["spec"]["containers"][0]["envFrom"]
    }
    assert set(re.findall(r"create secret generic (\S+)", told)) == secrets
    for file in re.findall(r"infra/[\w./-]+\.(?:yaml|example)|infra/Dockerfile", told):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_takes_the_pods(name: str) -> None:
    version = kubernetes_validate.latest_version()
    for group in groups(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)
        pod = copy.deepcopy(pod)
        pod["spec"]["containers"][0]["imag"] = "x"
        with pytest.raises(kubernetes_validate.ValidationError, match="imag"):
            kubernetes_validate.validate(pod, version, strict=True)


def test_rays_autoscaler_reads_the_groups() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    manifest = copy.deepcopy(KUBERAY["raycluster"])
    manifest["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    validate_config(config)
    assert config["idle_timeout_minutes"] == 5
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"] | {"memory": 0} == {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1, "memory": 0}
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 4)


def test_the_kind_of_a_gpu_is_quoted_for_all_that_read_it() -> None:
    """The shell unquotes it, Ray's autoscaler drops its ends and all backslashes, the operator drops quotes alone."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec
    from ray.autoscaler._private.cli_logger import cli_logger
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources
    from ray.scripts.scripts import parse_resources_json, start

    (group,) = (g for g in groups("raycluster") if "resources" in g["rayStartParams"])
    written = group["rayStartParams"]["resources"]
    (kind,) = told = {"accelerator_type:L4": 1}
    assert _get_custom_resources({}, group["rayStartParams"], "gpu") == told
    assert json.loads(written.strip("'\"` ")) == told
    command = ["bash", "-c", f"printf %s --resources={written}"]
    given = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    taken = start.make_context("start", ["--head", given]).params["resources"]
    node = ResourceAndLabelSpec(resources=parse_resources_json(taken, cli_logger, None)).resolve(is_head=False)
    assert node.to_resource_dict()[kind] == 1


def test_ray_up_asks_aws_for_the_kind_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the file need not say it."""
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.util import prepare_config

    machine = {"VCpuInfo": {"DefaultVCpus": 16}, "MemoryInfo": {"SizeInMiB": 131072}}
    gpu = machine | {"GpuInfo": {"Gpus": [{"Name": "L40S", "Count": 1}]}}
    answer = [
        {"InstanceType": kind["node_config"]["InstanceType"]} | (gpu if kind["resources"].get("GPU") else machine)
        for kind in CLOUD["available_node_types"].values()
    ]
    monkeypatch.setattr(node_provider, "list_ec2_instances", lambda region, credentials: answer)
    fill = node_provider.AWSNodeProvider.fillout_available_node_types_resources
    found = autoscaling.configured(fill(prepare_config(copy.deepcopy(CLOUD))))
    asked = RayConfig(num_workers=4, gpus_per_worker=1, accelerator_type="L40S")
    assert capacity.problems(asked, [], found) == []


# ---------------------------------------------------------------- what stays on a node


def state() -> str:
    """Where nodes keep what a store or MLflow that is away did not take, as a folder of the image's user."""
    dockerfile = (INFRA / "Dockerfile").read_text()
    (folder,) = re.findall(r"^ENV XDG_STATE_HOME=(\S+)$", dockerfile, re.MULTILINE)
    (user,) = re.findall(r"^USER (\w+)$", dockerfile, re.MULTILINE)
    # A volume of Docker that is new has the owner of the image's folder.
    assert f"install --directory --owner={user} --group={user} {folder}" in dockerfile
    return folder


def test_what_compose_keeps_outlives_its_containers() -> None:
    for name, service in COMPOSE["services"].items():
        if "ray start" in str(service.get("command")):
            (volume,) = (v.partition(":")[0] for v in service["volumes"] if v.endswith(f":{state()}"))
            assert volume in COMPOSE["volumes"], name
            assert "XDG_STATE_HOME" not in service["environment"], "the image says it"


def test_what_machines_of_the_cloud_keep_outlives_their_containers() -> None:
    assert f"--volume=hyperlora-state:{state()}" in CLOUD["docker"]["run_options"]


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_can_have_a_volume_that_outlives_them(name: str) -> None:
    readme, written = (INFRA / "README.md").read_text(), (INFRA / f"kuberay/{name}.yaml").read_text()
    (mark,) = re.findall(r"sed 's/(.+?)//' infra/kuberay/raycluster\.yaml", readme)
    claim = yaml.safe_load((INFRA / "kuberay/state.yaml").read_text())
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(claim, version, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "all pods have it at once"
    (uid,) = re.findall(r"useradd .*--uid (\d+)", (INFRA / "Dockerfile").read_text())
    manifest = yaml.safe_load(written.replace(mark, ""))
    jsonschema.validate(manifest, SCHEMA)
    with mock.patch.dict(KUBERAY, {name: manifest}):
        for group in groups(name):
            pod = group["template"]["spec"]
            kind = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
            kubernetes_validate.validate(kind, version, strict=True)
            (volume,) = pod["volumes"]
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert pod["containers"][0]["volumeMounts"] == [{"name": volume["name"], "mountPath": state()}]
            assert pod["securityContext"] == {"fsGroup": int(uid)}, "it belongs to root otherwise"
            for key in ("volumes", "securityContext"):
                del pod[key]
            del pod["containers"][0]["volumeMounts"]
    assert manifest == KUBERAY[name], "nothing else is behind these marks"


def test_the_readme_says_what_is_lost_with_a_node() -> None:
    told = (INFRA / "README.md").read_text().partition("## What stays on a node")[2]
    assert {w.rpartition("/hyperlora/")[0] for w in re.findall(r"/\S+/hyperlora/RUN", told)} == {state()}
    minutes = {2: "two", 5: "five", 10: "ten"}
    idle = KUBERAY["raycluster"]["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] // 60
    finished = KUBERAY["rayjob"]["spec"]["ttlSecondsAfterFinished"] // 60
    assert f"with the machine, {minutes[CLOUD['idle_timeout_minutes']]} minutes" in told
    assert f"with the pod, {minutes[idle]} minutes after its last work, of a RayJob {minutes[finished]} minutes" in told
    assert f"`storage.final_retry_seconds` ({StorageConfig().final_retry_seconds:.0f})" in told


def test_the_readme_fetches_an_adapter_where_the_store_is_reached() -> None:
    """No port of the store's is open: on the machine itself the same command would ask AWS."""
    commands = (INFRA / "README.md").read_text().replace("\\\n", " ")
    ((service, run, folder),) = re.findall(r"exec (\w+) hyperlora export (s3://\S+/RUN) (\S+)\n", commands)
    assert "AWS_ENDPOINT_URL" in COMPOSE["services"][service]["environment"]
    submitted = re.search(r"submit train .*storage\.uri=(\S+) +mlflow", commands)
    assert submitted is not None
    assert run == f"{submitted[1]}/RUN"
    assert re.findall(r"docker compose .* cp (\S+) \S+\n", commands) == [f"{service}:{folder}"]


# ---------------------------------------------------------------- shared memory


def object_store(memory: int, shared: int) -> int:
    """Bytes that Ray takes for its object store by itself in a container that has nothing in its memory yet."""
    with mock.patch.object(ray_utils, "get_shared_memory_bytes", return_value=shared):
        return ray_utils.resolve_object_store_memory(memory)


def size(text: str) -> float:
    """Bytes, of what Docker takes."""
    found = re.fullmatch(r"([\d.]+)([kmg]?)b?", text.strip("'"))
    assert found is not None, text
    return float(found[1]) * 1024 ** " kmg".index(found[2] or " ")


@pytest.mark.parametrize("name", KUBERAY)
def test_the_object_store_of_a_pod_fits_into_its_shared_memory(name: str) -> None:
    for group in groups(name):
        container = group["template"]["spec"]["containers"][0]
        memory = int(parse_quantity(container["resources"]["limits"]["memory"]))
        # Where nothing is mounted there, the operator mounts a volume that is as large as the pod's memory.
        assert "/dev/shm" not in [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        assert "object-store-memory" not in group["rayStartParams"]
        assert object_store(memory, shared=memory) == int(0.3 * memory) < memory


@pytest.mark.parametrize("service", ["head", "worker"])
def test_the_object_store_of_a_container_fits_into_its_shared_memory(service: str) -> None:
    from ray.scripts.scripts import start

    shared = size(COMPOSE["services"][service]["shm_size"])
    # By itself Ray takes a part of the machine's memory, of whatever size that is.
    assert object_store(64 * 1024**3, int(shared)) > shared
    given = start.make_context("start", words(COMPOSE["services"][service]["command"])[2:]).params
    assert given["object_store_memory"] is not None
    assert given["object_store_memory"] <= 0.75 * shared, "workers of a run share memory there as well"


@pytest.mark.parametrize("name", CLOUD["available_node_types"])
@pytest.mark.parametrize("gibibytes", [16, 128, 1024])
def test_the_object_store_of_a_machine_fits_into_its_shared_memory(name: str, gibibytes: int) -> None:
    from ray.autoscaler._private.command_runner import DockerCommandRunner
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    runner = object.__new__(DockerCommandRunner)  # without a machine
    memory = gibibytes * 1024**3
    said = f"MemAvailable: {memory // 1024} kB".encode()
    runner.ssh_command_runner = mock.Mock(**{"run.return_value": said})
    config = AutoscalingConfig(prepare_config(copy.deepcopy(CLOUD)), skip_content_hash=True)
    runner.docker_config = config.get_docker_config(name)
    options = runner._auto_configure_shm([*runner.docker_config["run_options"]])
    (shared,) = (size(o.partition("=")[2]) for o in options if o.startswith("--shm-size="))
    assert object_store(memory, int(shared)) <= shared


@pytest.mark.parametrize("service", ["head", "worker"])
def test_ray_takes_its_commands(service: str) -> None:
    from ray.scripts.scripts import start

    command = words(COMPOSE["services"][service]["command"])
    assert command[:2] == ["ray", "start"]
    start.make_context("start", command[2:])
    with pytest.raises(click.exceptions.NoSuchOption):
        start.make_context("start", ["--no-such-option"])


def test_mlflow_takes_its_command() -> None:
    from mlflow.cli import cli

    command = words(COMPOSE["services"]["mlflow"]["command"])
    assert command[:2] == ["mlflow", "server"]
    cli.commands["server"].make_context("server", command[2:])


def test_mlflow_finds_its_database_and_gets_no_more_than_it_needs() -> None:
    service = COMPOSE["services"]["mlflow"]
    (uri,) = re.findall(r"--backend-store-uri (\S+)", service["command"])
    driver = make_url(filled(uri)).get_dialect().driver
    assert re.search(rf'"{driver}\[binary\]==[\d.]+"', (INFRA / "Dockerfile").read_text())
    assert make_url(filled(uri)).password is None, "command lines are seen by all"
    assert service["environment"]["PGPASSWORD"] == COMPOSE["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"]
    for name in ("mlflow", "bucket"):
        assert not [key for key in COMPOSE["services"][name]["environment"] if "RAY" in key], name


def test_the_store_knows_the_keys_that_the_nodes_have() -> None:
    store, node = COMPOSE["services"]["store"], COMPOSE["services"]["head"]["environment"]
    (file,) = store["configs"]
    assert f"-s3.config={file['target']}" in store["command"]
    content = re.sub(r"\$\{(\w+)[^}]*\}", r"\1", COMPOSE["configs"][file["source"]]["content"])
    (identity,) = json.loads(content)["identities"]
    keys = [re.sub(r"\$\{(\w+)[^}]*\}", r"\1", node[k]) for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    assert [list(c.values()) for c in identity["credentials"]] == [keys]


def test_the_bucket_is_the_same_everywhere() -> None:
    made = COMPOSE["services"]["bucket"]["command"][-1]
    (bucket,) = re.findall(r"fs.mkdir\('(\w+)'\)", made)
    used = re.findall(r"s3://(\w+)", COMPOSE["services"]["mlflow"]["command"] + (INFRA / "README.md").read_text())
    assert set(used) == {bucket}


def test_the_token_of_the_cloud_lies_where_the_images_user_looks() -> None:
    (user,) = re.findall(r"^USER (\w+)$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert CLOUD["file_mounts"] == {f"/home/{user}/.ray/auth_token": "~/.ray/auth_token"}


def test_the_image_has_what_ray_up_calls_in_it() -> None:
    assert {"rsync", "openssh-client", "git", "wget"} <= set((INFRA / "Dockerfile").read_text().split())


def test_the_image_has_what_its_servers_import() -> None:
    """What MLflow needs for artifacts on S3 and Ray for machines on AWS is no dependency of the package."""
    dockerfile = (INFRA / "Dockerfile").read_text()
    (named,) = re.findall(r"^RUN pip install .*--constraint requirements.txt \. (.*)$", dockerfile, re.MULTILINE)
    brought = {re.split(r"[\[=]", word)[0] for word in [*jobs.pinned(), *shlex.split(named)]}
    assert "--artifacts-destination s3://" in COMPOSE["services"]["mlflow"]["command"]
    assert CLOUD["provider"]["type"] == "aws"
    assert {"boto3", "psycopg", "ray", "mlflow"} <= brought
    assert "boto3" in PINS


def test_ray_takes_the_cloud_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = copy.deepcopy(CLOUD)
    validate_config(prepared := prepare_config(config))
    # Its own for AWS install another boto3 than the image has.
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []
    from ray.scripts.scripts import start

    for kind in ("head", "worker"):
        (command,) = (c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c)
        start.make_context("start", shlex.split(command.split("ray start", 1)[1]))
    with pytest.raises(Exception, match="nonsense"):
        validate_config(prepare_config(config | {"nonsense": 1}))


def test_containers_of_the_cloud_see_the_gpus_that_ray_counts() -> None:
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    config = AutoscalingConfig(prepare_config(copy.deepcopy(CLOUD)), skip_content_hash=True)
    for name, kind in CLOUD["available_node_types"].items():
        options = config.get_docker_config(name).get("worker_run_options", [])
        assert ("--gpus=all" in options) == (kind["resources"].get("GPU", 0) > 0), name
        assert config.get_docker_config(name)["run_options"] == CLOUD["docker"]["run_options"]


def test_machines_of_the_cloud_are_not_the_old_ones_that_ray_takes_by_itself() -> None:
    for name, kind in CLOUD["available_node_types"].items():
        image = kind["node_config"]["ImageId"]
        assert image.lower() not in ("", "latest_dlami"), name  # for these Ray takes its own
        assert not re.fullmatch(r"ami-[0-9a-f]+", image), "one of one region and of one day"
    told = (INFRA / "README.md").read_text()
    (before,) = re.findall(r"`ImageId` of `infra/ray-cluster.yaml`.*?;\n", told, re.DOTALL)
    assert "cu130" in told
    assert "driver 580" in before  # which CUDA 13.0 needs


def test_images_of_others_are_pinned() -> None:
    images = [s["image"] for s in COMPOSE["services"].values()]
    for name in KUBERAY:
        images += [c["image"] for g in groups(name) for c in g["template"]["spec"]["containers"]]
    images += [v for k, v in CLOUD["docker"].items() if k.endswith("image")]
    others = {i for i in images if "hyperadalora:" not in i}
    assert {i.partition(":")[0] for i in others} == {"postgres", "chrislusf/seaweedfs"}
    dockerfile = (INFRA / "Dockerfile").read_text()
    default = re.findall(r"^ARG (\w+)=(.*)$", dockerfile, re.MULTILINE)
    (base,) = re.findall(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    for name, value in default:
        base = base.replace(f"${{{name}}}", value)
    for image in {*others, base}:
        assert re.fullmatch(r"[\w/]+:\d+(\.\d+)*(-slim)?", image), image
    # Ray and MLflow are in the image, as the project pins them.
    assert {"ray", "mlflow", "torch"} <= set(PINS)


def test_servers_listen_where_they_are_looked_for() -> None:
    services = COMPOSE["services"]
    store = services["store"]
    command = words(store["command"])
    assert command[0] == "server"
    assert "-s3" in command
    (port,) = (w.partition("=")[2] for w in command if w.startswith("-s3.port="))
    assert f"-dir={store['volumes'][0].partition(':')[2]}" in command
    assert store["healthcheck"]["test"][-1] == f"http://127.0.0.1:{port}/healthz"
    for name in ("head", "worker", "mlflow", "bucket"):
        assert services[name]["environment"]["AWS_ENDPOINT_URL"] == f"http://store:{port}"
    assert "ports" not in store, "nobody but the services uses it"

    command = words(services["mlflow"]["command"])
    port = command[command.index("--port") + 1]
    assert services["mlflow"]["healthcheck"]["test"][-1] == f"http://127.0.0.1:{port}/health"
    assert services["mlflow"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"mlflow:{port}" in command[command.index("--allowed-hosts") + 1].split(",")

    head, worker = services["head"], services["worker"]
    given = dict(w.removeprefix("--").split("=") for w in words(head["command"]) if "=" in w)
    assert head["ports"] == ["127.0.0.1:{0}:{0}".format(given["dashboard-port"])]
    assert head["healthcheck"]["test"][-1] == f"127.0.0.1:{given['port']}"
    assert f"--address=head:{given['port']}" in words(worker["command"])
    (port,) = (w.partition("=")[2] for w in words(worker["command"]) if w.startswith("--dashboard-agent-listen-port="))
    path = "/api/local_raylet_healthz"
    assert worker["healthcheck"]["test"][-1] == f"http://127.0.0.1:{port}{path}"
    assert path in PUBLIC_EXACT_PATHS, "the probe has no token"


def test_versions_images_and_ports_agree() -> None:
    dockerfile, readme = (INFRA / "Dockerfile").read_text(), (INFRA / "README.md").read_text()
    built = set(re.findall(r"-t (hyperadalora:\w+)", readme))
    assert built == {"hyperadalora:cpu", "hyperadalora:cuda"} == set(re.findall(r"-t (hyperadalora:\w+)", dockerfile))
    used = set(re.findall(r"hyperadalora:\w+", "".join(p.read_text() for p in INFRA.rglob("*.yaml"))))
    assert used == built
    for name in KUBERAY:
        assert cluster_spec(name)["rayVersion"] == PINS["ray"]
        head = groups(name)[0]["template"]["spec"]["containers"][0]
        assert {p["containerPort"] for p in head["ports"]} == {6379, 8265}
    assert re.search(r"^EXPOSE 6379 8265 5000$", dockerfile, re.MULTILINE)
    ports = [p for s in COMPOSE["services"].values() for p in s.get("ports", [])]
    assert ports == ["127.0.0.1:8265:8265", "127.0.0.1:5000:5000"]
    for copied in re.findall(r"^COPY (\S+) \1$", dockerfile, re.MULTILINE):
        assert (ROOT / copied / "__init__.py").is_file()


def test_the_job_of_the_manifest_and_of_the_readme_is_one_that_the_command_takes() -> None:
    entry = KUBERAY["rayjob"]["spec"]["entrypoint"].split()
    written = re.search(r"hyperlora (submit train.*?--address \S+)", (INFRA / "README.md").read_text(), re.DOTALL)
    assert written is not None
    submitted = parse_arguments(shlex.split(written[1].replace("\\\n", " ")))
    for given in (entry[1:], submitted.words):
        args = parse_arguments(given)
        recipe = parse(apply_overrides(read_yaml(shipped()[args.recipe]), args.overrides))
        assert recipe.storage.uri.startswith("s3://hyperlora/")
        assert recipe.mlflow.tracking_uri == f"http://mlflow:{5000}"


def written_out(text: str) -> list[str]:
    """Secrets whose value stands in a text, and is no variable, command or omission."""
    found = re.findall(rf"(?<!\$\{{)\b({SECRET}|accessKey|secretKey)\"?[ \t]*[:=][ \t]*[\"']?([^\s\"',}}]+)", text)
    return [name for name, value in found if not re.match(r"\$\{\w|\$\(|…", value)]


def test_no_secret_has_a_value_in_these_files() -> None:
    for shown in (
        "S3_KEY=abc",
        "  S3_SECRET: 'abc'",
        '"secretKey": "abc"',
        "{POSTGRES_PASSWORD: abc}",
        "-e HF_TOKEN=abc",
    ):
        assert written_out(shown), shown
    files = [p for p in INFRA.rglob("*") if p.is_file() and p.name != ".env"]
    assert {p.name: written_out(p.read_text()) for p in files} == {p.name: [] for p in files}

    names = re.findall(r"^(\w+)=(.*)$", (INFRA / "env.example").read_text(), re.MULTILINE)
    assert dict(names) == dict.fromkeys(("RAY_AUTH_TOKEN", "S3_KEY", "S3_SECRET", "POSTGRES_PASSWORD"), "")
    text = (INFRA / "compose.yaml").read_text()
    for name, _ in names:
        assert re.findall(rf"\$\{{{name}[^}}]*\}}", text)
        assert not re.findall(rf"\$\{{{name}:?-", text), "no default: it would be everybody's"
    assert "/infra/.env" in (ROOT / ".gitignore").read_text()


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_secrets_by_reference(name: str) -> None:
    assert KUBERAY[name]["kind"] != "Secret"
    for group in groups(name):
        for container in group["template"]["spec"]["containers"]:
            for variable in container.get("env", []):
                by_value = re.fullmatch(SECRET, variable["name"]) and "secretKeyRef" not in variable.get(
                    "valueFrom", {}
                )
                assert not by_value, variable["name"]


def every_probe() -> list[Any]:
    return [(name, s) for name, s in COMPOSE["services"].items() if name != "bucket"]  # it ends


@pytest.mark.parametrize(("name", "service"), every_probe())
def test_services_have_a_probe(name: str, service: dict[str, Any]) -> None:
    assert service["healthcheck"]["test"][0] == "CMD"
