"""What somebody chooses about a deployment beside the run's config, and what does not go together.

Invariant: a `Deployment` that passes `check` can hold the run's smallest number of workers, and everything the run names is
where its pods see it. All mistakes are told at once, before a line of a manifest is printed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastic_lm.errors import ConfigError

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig

RAY_VERSION = "2.60.0"  # in the image, and what the autoscaler's rules are checked against
MAX_NAME = 47  # of a RayJob: KubeRay appends up to 16 characters for the objects it makes, and Kubernetes stops at 63
MEBIBYTES = {"Mi": 1, "Gi": 1024, "Ti": 1024 * 1024}
SPOT, ON_DEMAND, ONLY = "spot", "on-demand", "workers"  # worker groups


@dataclass(frozen=True)
class Deployment:
    """Sizes, places and names. CPUs are whole: Ray counts a pod's CPUs in whole numbers and rounds up, which oversubscribes."""

    name: str
    """Of the RayJob or RayCluster and of what belongs to it."""
    image: str
    namespace: str | None = None
    """None: the one that `kubectl` applies to."""
    service_account: str | None = None
    """Of head and workers, for roles in a cloud. None: KubeRay makes one for the head, workers have the namespace's."""
    s3_secret: str | None = None
    """A Secret whose keys are the storage client's variables (AWS_ACCESS_KEY_ID and so on). None: a role gives access."""
    s3_port: int = 443
    """Port of the object store, which pods may reach."""
    token_auth: bool = False
    """Whether Ray asks every client for a token. KubeRay makes the token and keeps it in a Secret."""
    auth_secret: str | None = None
    """A Secret with the key auth_token in place of KubeRay's."""
    workers_per_pod: int = 1
    worker_cpus: int | None = None
    """CPUs of a worker pod. None: what its workers hold."""
    worker_memory: str = "8Gi"
    head_cpus: int = 2
    head_memory: str = "8Gi"
    spot_labels: tuple[tuple[str, str], ...] = ()
    """What marks a node that may be taken away. Without any, there is one group of workers, on any node."""
    spot_taints: tuple[tuple[str, str], ...] = ()
    """Taints of such nodes, which spot pods tolerate. An empty value: whatever the taint's value."""
    spot_max_pods: int | None = None
    """At most so many spot pods. None: as many as the run wants."""
    max_pods: int | None = None
    """At most so many pods of the other group. None: as many as the run wants."""
    min_pods: int | None = None
    """Pods of the other group that are there at all times. None: what the run needs to begin."""
    drain_s: int = 60
    """A pod that is taken away has this long: its workers leave between two steps, and the run on a head that goes is saved."""
    retries: int = 3
    """How often a failed RayJob is begun again, on a new cluster."""
    monitoring_namespace: str = "monitoring"
    """Whose pods may scrape metrics."""
    operator_namespace: str = "kuberay-system"
    """Where KubeRay's operator runs, which submits the run and asks how it is."""


@dataclass(frozen=True)
class Group:
    """A worker group: how many pods, and which are taken first."""

    name: str
    min_pods: int
    max_pods: int
    priority: int


def label_of(name: str) -> str:
    """A run's name as a DNS label that begins with a letter: `My.Run_2` is my-run-2. May be too long."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return label if label[:1].isalpha() else f"run-{label}"


def mebibytes(quantity: str) -> int:
    """`8Gi` is 8192.    Raises: ConfigError."""
    found = re.fullmatch(r"(\d{1,9})(Mi|Gi|Ti)", quantity)
    if found is None or int(found[1]) == 0:
        raise ConfigError(f"{quantity!r} is no amount of memory; write a whole number of Mi, Gi or Ti, e.g. 8Gi")
    return int(found[1]) * MEBIBYTES[found[2]]


def cpus_of_pod(config: RunConfig, deployment: Deployment) -> int:
    """CPUs of a worker pod: what was chosen, or what its workers hold."""
    return deployment.worker_cpus or max(1, _held(config.workers.num_cpus, deployment))


def gpus_of_pod(config: RunConfig, deployment: Deployment) -> int:
    return _held(config.workers.num_gpus, deployment)


def groups_of(config: RunConfig, deployment: Deployment) -> list[Group]:
    """The run's elastic range as groups of pods.

    The run's minimum is held by machines that stay, so it begins at once and preemptions never take its last worker, whose
    loss would cost the steps since a checkpoint. All beyond it is asked of spot machines first. A minimum of spot pods would
    be in the way: the autoscaler counts pods that wait for a machine as there, and never falls back for them.
    """
    wanted = _pods(config.workers.max, deployment)
    least = _pods(config.workers.min, deployment) if deployment.min_pods is None else deployment.min_pods
    most = wanted if deployment.max_pods is None else deployment.max_pods
    if not deployment.spot_labels:
        return [Group(ONLY, min(least, most), most, priority=0)]
    most_spot = wanted if deployment.spot_max_pods is None else deployment.spot_max_pods
    return [Group(SPOT, 0, most_spot, priority=10), Group(ON_DEMAND, min(least, most), most, priority=1)]


def pods_of(config: RunConfig, deployment: Deployment) -> tuple[int, int]:
    """Worker pods that hold workers.min, and workers.max."""
    return _pods(config.workers.min, deployment), _pods(config.workers.max, deployment)


def check(config: RunConfig, deployment: Deployment) -> None:
    """Raises: ConfigError with a line for each mistake."""
    rules = (_check_name, _check_places, _check_sizes, _check_range, _check_spot, _check_access)
    if broken := [sentence for rule in rules for sentence in rule(config, deployment)]:
        raise ConfigError("\n".join(broken))


def _held(each: float, deployment: Deployment) -> int:
    return math.ceil(each * deployment.workers_per_pod - 1e-9)  # 3 x 0.1 is 0.30000000000000004


def _pods(workers: int, deployment: Deployment) -> int:
    return -(-workers // deployment.workers_per_pod)


# -- the rules -------------------------------------------------------------------------------------------------------


def _check_name(config: RunConfig, deployment: Deployment) -> Iterator[str]:
    name = deployment.name
    if len(name) > MAX_NAME:
        of = f"run {config.name} would be the RayJob {name}" if name == label_of(config.name) else f"--name {name}"
        yield (
            f"{of}: {len(name)} characters, and KubeRay allows {MAX_NAME}; name the RayJob with --name, e.g. --name "
            f"{name[:MAX_NAME].rstrip('-')} (the run keeps its name, by which it resumes)"
        )
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        yield f"--name {name!r} is no DNS label; use a-z, 0-9 and -, a letter first, e.g. --name {label_of(name)}"
    spaces = [("--namespace", deployment.namespace)] if deployment.namespace is not None else []
    spaces += [
        ("--monitoring-namespace", deployment.monitoring_namespace),
        ("--operator-namespace", deployment.operator_namespace),
    ]
    for option, space in spaces:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", space):
            yield f"{option} {space!r} is no name of a namespace; use at most 63 of a-z, 0-9 and -, not at the ends"
    if not re.fullmatch(r"[^\s,:@]+(:\d+)?(/[^\s,:@]+)*(:[\w.-]{1,128})?(@sha256:[0-9a-f]{64})?", deployment.image):
        yield f"--image {deployment.image!r} is no image; write e.g. registry.example.com/elastic-lm:1.0"


def _check_places(config: RunConfig, _: Deployment) -> Iterator[str]:
    """Pods see object storage and what is in their image: a folder would be another one in each of them."""
    for field, address in (("storage", config.storage), ("data.tokens", config.data.tokens)):
        if not address.startswith("s3://"):
            yield (
                f"{field}={address} is a folder of this machine, which no pod sees; put it into object storage, e.g. "
                f"--set {field}=s3://bucket/{'prefix' if field == 'storage' else 'tokens'}"
            )
    if config.model.init is not None and "://" in config.model.init and "s3://" not in config.model.init:
        yield (
            f"model.init={config.model.init} is a folder of this machine, which no pod sees; copy it into object storage, "
            "e.g. --set model.init=hf:s3://bucket/model"
        )
    if config.checkpoint.fallback is not None:
        yield (
            f"checkpoint.fallback={config.checkpoint.fallback} would be a folder of a pod, and goes with the pod: it would keep "
            "nothing; leave it out with --set checkpoint.fallback=null"
        )
    if config.metrics.tls_certificate is not None:
        yield (
            f"metrics.tls_certificate={config.metrics.tls_certificate} is a file that no pod has, and the PodMonitor asks by "
            "http; the NetworkPolicy lets nobody else in. Leave both out: --set metrics.tls_certificate=null --set "
            "metrics.tls_key=null"
        )
    if config.tracking.folder is not None:
        yield (
            f"tracking.folder={config.tracking.folder} would be a folder of the head's pod, and goes with the pod; leave it "
            "out, and files for trackers with it: --set tracking={}. From the run's log, `elastic-lm export RUN --to "
            "tensorboard` fills a folder of yours at any time"
        )


def _check_sizes(config: RunConfig, deployment: Deployment) -> Iterator[str]:
    for option, memory in (("--worker-memory", deployment.worker_memory), ("--head-memory", deployment.head_memory)):
        try:
            mebibytes(memory)
        except ConfigError as error:
            yield f"{option}: {error}"
    needed = max(1, _held(config.workers.num_cpus, deployment))
    if deployment.worker_cpus is not None and deployment.worker_cpus < needed:
        yield (
            f"--worker-cpus {deployment.worker_cpus} holds no {deployment.workers_per_pod} worker(s) with "
            f"workers.num_cpus={config.workers.num_cpus:g}, so no worker would ever be placed; use at least {needed}, or "
            "lower workers.num_cpus"
        )


def _check_range(config: RunConfig, deployment: Deployment) -> Iterator[str]:
    workers, each = config.workers, deployment.workers_per_pod
    groups = groups_of(config, deployment)
    room = sum(group.max_pods for group in groups) * each
    if room < workers.min:
        limits = " + ".join(f"{group.max_pods} {group.name}" for group in groups)
        yield (
            f"workers.min={workers.min} is more than ever fits: {limits} pods with {each} worker(s) each hold {room}, so the "
            f"run would wait for ever; allow {_pods(workers.min, deployment)} pods with --max-pods"
            f"{' or --spot-max-pods' if deployment.spot_labels else ''}, or lower workers.min"
        )
    held, most = deployment.min_pods, groups[-1].max_pods
    if held is not None and held > most:
        yield (
            f"--min-pods {held} is more than the {most} pods that the group {groups[-1].name} may have; lower it, or raise "
            "--max-pods"
        )


def _check_spot(_: RunConfig, deployment: Deployment) -> Iterator[str]:
    if not deployment.spot_labels and (deployment.spot_taints or deployment.spot_max_pods is not None):
        option = "--spot-taint" if deployment.spot_taints else "--spot-max-pods"
        yield (
            f"{option} is for nodes that --spot-label names, and it names none; add it, e.g. --spot-label "
            "karpenter.sh/capacity-type=spot"
        )


def _check_access(_: RunConfig, deployment: Deployment) -> Iterator[str]:
    names = (
        ("--s3-secret", deployment.s3_secret),
        ("--auth-secret", deployment.auth_secret),
        ("--service-account", deployment.service_account),
    )
    for option, name in names:
        if name is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
            yield (
                f"{option} takes the name of an object in the cluster, and what was given is none; never give a secret "
                "itself: kubectl create secret"
            )
