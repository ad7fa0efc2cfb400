"""How far a cluster's autoscaler goes, from where its platform says so. Imports ray.

Ray itself does not say. Platforms that report it to Ray's head are believed; KubeRay's autoscaler reads the RayCluster
resource, that of ``ray up`` a file, and both can be read on the head alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import requests
import yaml
from ray._private.state import state
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

from hyperlora.capacity import Group, Growth
from hyperlora.config import first_line

logger = logging.getLogger(__name__)

#: Where ``ray up`` puts what it was given, on the head.
FILE = "~/ray_bootstrap_config.yaml"
#: Where a pod of Kubernetes finds its namespace.
NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
#: Begins the line in which a job tells what it found.
TOLD = "growth of the cluster: "


def growth() -> Growth | None:
    """How far the autoscaler of the cluster goes that this process, on its head, is connected to.

    Returns:
        None when nothing here says so.
    """
    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        groups = [
            Group(g.name, dict(g.resources), None if g.max_count < 0 else g.max_count)
            for g in reported.node_group_configs
        ]
        return Growth(groups, resources=dict(reported.max_resources))
    if cluster := os.environ.get("RAY_CLUSTER_NAME"):  # KubeRay sets it, and the namespace in its newest versions
        try:
            namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or Path(NAMESPACE).read_text(encoding="utf-8").strip()
            resource = KubernetesHttpApiClient(namespace).get(f"rayclusters/{cluster}")
        except FileNotFoundError:
            return Growth([])  # the pod has no account's token, so that an autoscaler in it would have none either
        except (requests.RequestException, OSError) as error:
            answer = error.response if isinstance(error, requests.RequestException) else None
            if answer is not None and answer.status_code == requests.codes.forbidden:
                return Growth([])  # an autoscaler would read it beside the head, with the same account
            logger.warning("the RayCluster %s cannot be read: %s", cluster, first_line(error))
            return None
        if not resource["spec"].get("enableInTreeAutoscaling"):
            return Growth([])  # KubeRay labels the nodes of its groups all the same
        return configured(_derive_autoscaling_config_from_ray_cr(resource))
    file = Path(FILE).expanduser()
    return configured(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else None


def configured(config: Mapping[str, Any]) -> Growth | None:
    """The same from the configuration of Ray's autoscaler; None when it does not say what its nodes have."""
    most = config.get("max_workers")
    types = {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}
    if not all(t.get("resources") for t in types.values()):
        return None
    return Growth([Group(k, t["resources"], t.get("max_workers", most)) for k, t in types.items()], most)


def write(found: Growth | None) -> str:
    """One line of text."""
    return TOLD + json.dumps(found and asdict(found))


def read(text: str) -> Growth | None:
    """What ``write`` has written somewhere into a text.

    Raises:
        ValueError: there is no such line.
    """
    for line in text.splitlines():
        if line.startswith(TOLD):
            found = json.loads(line.removeprefix(TOLD))
            if found is None:
                return None
            return Growth([Group(**g) for g in found["groups"]], found["most"], found["resources"])
    raise ValueError("it was not told")


if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    print(write(growth()))
