"""What platforms say of their autoscalers, read as they say it; a real autoscaler is in test_autoscaler.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ray._private.state import state
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
from ray.autoscaler._private.util import prepare_config
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from hyperlora import autoscaling, capacity
from hyperlora.capacity import Group, Growth
from hyperlora.config import RayConfig

INFRA = Path(__file__).parents[2] / "infra"


@pytest.fixture(autouse=True)
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A head to whose Ray nothing is reported; its home."""
    monkeypatch.setattr(state, "get_cluster_config", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_nobody_says_anything() -> None:
    assert autoscaling.growth() is None


def test_what_is_reported_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterConfig(max_resources={"GPU": 64})
    config.node_group_configs.add(name="gpu", resources={"CPU": 8, "GPU": 1}, max_count=4)
    config.node_group_configs.add(name="spot", resources={"CPU": 4}, max_count=-1)
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    groups = [Group("gpu", {"CPU": 8, "GPU": 1}, 4), Group("spot", {"CPU": 4}, None)]
    assert autoscaling.growth() == Growth(groups, None, {"GPU": 64})


@pytest.fixture
def kubernetes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An API server that has our RayCluster; the head's environment as KubeRay sets it."""
    manifest = yaml.safe_load((INFRA / "kuberay/raycluster.yaml").read_text())
    manifest["metadata"]["namespace"] = "default"
    resources = {"rayclusters/hyperadalora": manifest, "else": 404}
    monkeypatch.setenv("RAY_CLUSTER_NAME", "hyperadalora")
    monkeypatch.setenv("RAY_CLUSTER_NAMESPACE", "default")

    def get(client: KubernetesHttpApiClient, path: str) -> Any:
        answer = requests.Response()
        answer.status_code = 200 if path in resources else resources["else"]
        answer.raise_for_status()
        return copy.deepcopy(resources[path])

    monkeypatch.setattr(KubernetesHttpApiClient, "get", get)
    return resources


@pytest.mark.usefixtures("kubernetes")
def test_our_cluster_on_kubernetes() -> None:
    found = autoscaling.growth()
    assert found is not None
    (group,) = found.groups
    assert (group.name, group.most, found.most) == ("gpu", 4, 4)
    assert (group.resources["CPU"], group.resources["GPU"]) == (8, 1)
    # None of its nodes lives yet.
    for kind, fits in (("L4", True), ("H100", False)):
        asked = RayConfig(num_workers=4, gpus_per_worker=1, accelerator_type=kind)
        assert (capacity.problems(asked, [], found) == []) is fits


@pytest.mark.usefixtures("kubernetes")
def test_the_pod_knows_its_namespace_where_kuberay_does_not_tell_it(
    head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_CLUSTER_NAMESPACE")
    assert autoscaling.growth() == Growth([]), "a pod without an account has none for an autoscaler either"
    (head / "namespace").write_text("default\n")
    monkeypatch.setattr(autoscaling, "NAMESPACE", str(head / "namespace"))
    asked = []
    monkeypatch.setattr(KubernetesHttpApiClient, "__init__", lambda client, namespace: asked.append(namespace))
    assert autoscaling.growth() is not None
    assert asked == ["default"]


@pytest.mark.parametrize("said", [{}, {"enableInTreeAutoscaling": False}])
def test_a_cluster_on_kubernetes_whose_groups_stay_as_they_are(
    kubernetes: dict[str, Any], said: dict[str, bool]
) -> None:
    """KubeRay labels the nodes of its groups whether there is an autoscaler or not."""
    spec = kubernetes["rayclusters/hyperadalora"]["spec"]
    del spec["enableInTreeAutoscaling"]
    spec |= said
    assert autoscaling.growth() == Growth([])


@pytest.mark.usefixtures("kubernetes")
def test_a_pod_without_the_token_of_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/var/run/secrets/kubernetes.io/serviceaccount/token")

    monkeypatch.setattr(KubernetesHttpApiClient, "get", missing)
    assert autoscaling.growth() == Growth([])


@pytest.mark.parametrize(
    ("status", "found"),
    [(403, Growth([])), (401, None), (404, None), (503, None)],
)
def test_a_cluster_whose_resource_cannot_be_read(kubernetes: dict[str, Any], status: int, found: Growth | None) -> None:
    kubernetes.clear()
    kubernetes["else"] = status
    assert autoscaling.growth() == found
    assert autoscaling.read(autoscaling.write(found)) == found


def test_our_cluster_of_ray_up(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (head / ".ray").mkdir()
    (head / ".ray/auth_token").write_text("x")
    config = prepare_config(yaml.safe_load((INFRA / "ray-cluster.yaml").read_text()))
    file = head / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(config))
    found = autoscaling.growth()
    assert found == Growth([Group("gpu", {"CPU": 16, "GPU": 1}, 4)], 4)
    assert autoscaling.read(f"noise\n{autoscaling.write(found)}\nnoise") == found
    # What its nodes have is then known to the cloud alone.
    del config["available_node_types"]["gpu"]["resources"]
    file.write_text(yaml.safe_dump(config))
    assert autoscaling.growth() is None


def test_what_a_job_tells() -> None:
    assert autoscaling.read(autoscaling.write(None)) is None
    with pytest.raises(ValueError, match="not told"):
        autoscaling.read("python: No module named hyperlora")
