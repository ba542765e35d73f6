"""A run as KubeRay's operator takes it: a RayJob or a RayCluster, and what belongs to it, as plain values.

A RayJob is a run with its cluster: made for it, gone after it, made again when it fails; the run resumes by its name. A
RayCluster stays, and runs are submitted to it.

The RayJob is submitted in HTTPMode: the operator talks to the head's dashboard in every mode, to learn how the job is. Here it
also submits, so there is no further pod to place, to secure and to lose; and where a lost head was replaced, whose dashboard
knows of no job, the operator submits it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from elastic_lm import config_text
from elastic_lm.deploy import choices, pods, rules
from elastic_lm.deploy.choices import Deployment, Group
from elastic_lm.deploy.network import network_policy

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig

API_VERSION = "ray.io/v1"
STOPPED = 5  # exit code of a run that was asked to stop: not a failure, or it would be begun again
KEPT_S = 600  # a finished cluster stays this long, for a look at its logs
IDLE_S = 120  # a pod without a worker stays this long
PENDING_S = 900  # a spot pod that does not run by then is given up, and its group is tried last for a while


def documents(config: RunConfig, deployment: Deployment, kind: str) -> list[dict[str, Any]]:
    """All objects, the RayJob or RayCluster last.    Raises: ConfigError, when something does not go together."""
    choices.check(config, deployment)
    ray = ray_job(config, deployment) if kind == "rayjob" else ray_cluster(config, deployment)
    assert not rules.broken(ray), rules.broken(ray)
    return [config_map(config, deployment), network_policy(config, deployment), ray]


def config_map(config: RunConfig, deployment: Deployment) -> dict[str, Any]:
    """The run's config, as far as it differs from the defaults."""
    chosen = config_text.dump(config.model_dump(mode="json", exclude_defaults=True))
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(deployment, pods.config_map_name(deployment)),
        "data": {pods.RUN_FILE: chosen},
    }


def ray_job(config: RunConfig, deployment: Deployment) -> dict[str, Any]:
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(deployment.drain_s)}}
    return {
        "apiVersion": API_VERSION,
        "kind": "RayJob",
        "metadata": metadata(deployment, deployment.name),
        "spec": {
            "entrypoint": entrypoint(),
            "submissionMode": "HTTPMode",
            "runtimeEnvYAML": config_text.dump(environment),
            "backoffLimit": deployment.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_S,
            "rayClusterSpec": cluster_spec(config, deployment),
        },
    }


def ray_cluster(config: RunConfig, deployment: Deployment) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": "RayCluster",
        "metadata": metadata(deployment, deployment.name),
        "spec": cluster_spec(config, deployment),
    }


def entrypoint() -> str:
    """Trains the mounted config; a stop on request counts as done. The endpoint is for pods that the NetworkPolicy lets in."""
    train = f"elastic-lm train {pods.CONFIG_FOLDER}/{pods.RUN_FILE} --set metrics.host=0.0.0.0"
    return f"{train} || [ $? -eq {STOPPED} ]"


def cluster_spec(config: RunConfig, deployment: Deployment) -> dict[str, Any]:
    """A head without CPUs for work, on a machine that stays, and the worker groups."""
    return {
        "rayVersion": choices.RAY_VERSION,
        **_authentication(deployment),
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": _autoscaler(deployment),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": pods.head(config, deployment),
        },
        "workerGroupSpecs": [
            _worker_group(config, deployment, group) for group in choices.groups_of(config, deployment)
        ],
    }


def metadata(deployment: Deployment, name: str) -> dict[str, Any]:
    namespace = {"namespace": deployment.namespace} if deployment.namespace else {}
    return {"name": name, **namespace, "labels": pods.labels(deployment)}


def _worker_group(config: RunConfig, deployment: Deployment, group: Group) -> dict[str, Any]:
    custom = {name: f"{amount * deployment.workers_per_pod:g}" for name, amount in config.workers.resources.items()}
    return {
        "groupName": group.name,
        "replicas": group.min_pods,
        "minReplicas": group.min_pods,
        "maxReplicas": group.max_pods,
        **({"priority": group.priority} if group.priority else {}),
        "rayStartParams": {},
        **({"resources": custom} if custom else {}),
        "template": pods.worker(config, deployment, group),
    }


def _autoscaler(deployment: Deployment) -> dict[str, Any]:
    amounts = {"cpu": "500m", "memory": "1Gi"}
    fallback = {"name": "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S", "value": str(PENDING_S)}
    return {
        "version": "v2",
        "idleTimeoutSeconds": IDLE_S,
        **({"env": [fallback]} if deployment.spot_labels else {}),
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": pods.container_security(),
        "volumeMounts": [pods.tmp_mount()],
    }


def _authentication(deployment: Deployment) -> dict[str, Any]:
    if not pods.uses_token(deployment):
        return {}
    secret = {"secretName": deployment.auth_secret} if deployment.auth_secret else {}
    return {"authOptions": {"mode": "token", **secret}}


# -- as text ---------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Spells out what occurs twice, and lines as lines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _lines(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _lines)


def as_text(objects: list[dict[str, Any]], comment: str) -> str:
    """One YAML stream with a comment before it."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return head + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=1000, explicit_start=True)
