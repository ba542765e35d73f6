"""Pods of the head and of workers: what runs in them, what they may do, what they may write to.

Invariant: no container, KubeRay's own included (they copy the security context, the variables and the mounts of ours), runs
as root, keeps a capability, gains a privilege or writes to its image. What has to be written goes to volumes that live as
long as the pod; what is to last goes to object storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elastic_lm.deploy.choices import SPOT, Deployment, Group, cpus_of_pod, gpus_of_pod, mebibytes

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig

USER, USERS = 1000, 100  # `ray` and its group in the rayproject images
GRACE_S = 10  # between the end of a drain and the kill: for Ray to take its processes down
RUN_FILE = "run.yaml"
CONFIG_FOLDER = "/etc/elastic-lm"
METRICS_PORT = "elastic-lm"  # a name, so that whoever scrapes need not know the number
RAY_METRICS_PORT = 8080
DASHBOARD_PORT = 8265
CACHES = "/home/ray/.cache"

# What runtime/cluster.py sets for clusters that it starts itself: a head finds a dead node after about a second, not 13.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}


def config_map_name(deployment: Deployment) -> str:
    return f"{deployment.name}-config"


def pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USERS,
        "fsGroup": USERS,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }


def tmp_mount() -> dict[str, str]:
    return {"name": "tmp", "mountPath": "/tmp"}


def labels(deployment: Deployment) -> dict[str, str]:
    """What all objects of a deployment have; KubeRay sets app.kubernetes.io/name itself."""
    return {"app.kubernetes.io/part-of": "elastic-lm", "app.kubernetes.io/instance": deployment.name}


def head(config: RunConfig, deployment: Deployment) -> dict[str, Any]:
    """The head's pod: the driver, the coordinator and Ray's services, and no worker. KubeRay adds the autoscaler to it."""
    ports = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
        {"name": "client", "containerPort": 10001},
        {"name": "metrics", "containerPort": RAY_METRICS_PORT},
    ]
    if config.metrics.port:
        ports.append({"name": METRICS_PORT, "containerPort": config.metrics.port})
    environment = {**_environment(deployment), **HEALTH_CHECKS}
    container = _container("ray-head", deployment, environment, ports, deployment.head_cpus, deployment.head_memory)
    spec = _spec(container, deployment, deployment.head_memory)
    return {
        "metadata": {
            "labels": labels(deployment),
            # A cluster autoscaler that packs nodes must not move it: the run would go back to its newest checkpoint.
            "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
        },
        # The autoscaler beside Ray asks the API server for pods, so this pod alone has a token.
        "spec": {**spec, **_off_spot(deployment)},
    }


def worker(config: RunConfig, deployment: Deployment, group: Group) -> dict[str, Any]:
    """A worker pod of this group."""
    gpus = gpus_of_pod(config, deployment)
    ports = [{"name": "metrics", "containerPort": RAY_METRICS_PORT}]
    environment = _environment(deployment)
    cpus = cpus_of_pod(config, deployment)
    container = _container("ray-worker", deployment, environment, ports, cpus, deployment.worker_memory, gpus)
    spec = _spec(container, deployment, deployment.worker_memory)
    place = _on_spot(deployment) if group.name == SPOT else _off_spot(deployment)
    tolerations = place.pop("tolerations", [])
    if gpus:
        tolerations = [*tolerations, {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "metadata": {"labels": labels(deployment)},
        "spec": {
            **spec,
            "automountServiceAccountToken": False,
            **place,
            **({"tolerations": tolerations} if tolerations else {}),
        },
    }


def _container(
    name: str,
    deployment: Deployment,
    environment: dict[str, str],
    ports: list[dict[str, Any]],
    cpus: int,
    memory: str,
    gpus: int = 0,
) -> dict[str, Any]:
    """Requests equal limits: a pod that may be starved of memory or CPU makes every step of all of them wait."""
    amounts = {"cpu": str(cpus), "memory": memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    secret = {"envFrom": [{"secretRef": {"name": deployment.s3_secret}}]} if deployment.s3_secret else {}
    return {
        "name": name,
        "image": deployment.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": ports,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        **secret,
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "run-config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            tmp_mount(),
            {"name": "caches", "mountPath": CACHES},
        ],
    }


def _spec(container: dict[str, Any], deployment: Deployment, memory: str) -> dict[str, Any]:
    account = {"serviceAccountName": deployment.service_account} if deployment.service_account else {}
    return {
        "restartPolicy": "Never",  # the autoscaler replaces pods; one that came back by itself would be counted twice
        "terminationGracePeriodSeconds": deployment.drain_s + GRACE_S,
        "enableServiceLinks": False,
        **account,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": _volumes(deployment, memory),
    }


def _volumes(deployment: Deployment, memory: str) -> list[dict[str, Any]]:
    """Shared memory counts as the pod's memory. Ray's object store takes 30 % of it; collectives within a node take some."""
    shared = {"medium": "Memory", "sizeLimit": f"{mebibytes(memory) // 2}Mi"}
    return [
        {"name": "run-config", "configMap": {"name": config_map_name(deployment)}},
        {"name": "shared-memory", "emptyDir": shared},
        {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},  # Ray's session: logs, sockets, objects that were spilled
        {"name": "caches", "emptyDir": {"sizeLimit": "10Gi"}},  # kernels and graphs that workers compile
    ]


def _environment(deployment: Deployment) -> dict[str, str]:
    return {
        # SIGTERM to `ray start --block` is a preemption notice with this deadline.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(deployment.drain_s),
        "RAY_USAGE_STATS_ENABLED": "0",
        **({} if uses_token(deployment) else {"RAY_AUTH_MODE": "disabled"}),  # with a token, KubeRay sets it
        "TRITON_CACHE_DIR": f"{CACHES}/triton",
        "CUDA_CACHE_PATH": f"{CACHES}/cuda",
    }


def uses_token(deployment: Deployment) -> bool:
    return deployment.token_auth or deployment.auth_secret is not None


def _on_spot(deployment: Deployment) -> dict[str, Any]:
    tolerations = [
        {"key": key, **({"operator": "Equal", "value": value} if value else {"operator": "Exists"})}
        for key, value in deployment.spot_taints
    ]
    return {"nodeSelector": dict(deployment.spot_labels), **({"tolerations": tolerations} if tolerations else {})}


def _off_spot(deployment: Deployment) -> dict[str, Any]:
    """Anywhere but there; a node without the label is fine."""
    if not deployment.spot_labels:
        return {}
    terms = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in deployment.spot_labels]
    # One term per label: terms are alternatives, and a spot node is one that has them all.
    alternatives = [{"matchExpressions": [term]} for term in terms]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": alternatives}}
    return {"affinity": {"nodeAffinity": required}}
