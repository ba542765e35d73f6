"""Whether a namespace's ResourceQuotas leave room for a deployment.

Kubernetes refuses a pod that goes beyond a quota when it is made: `kubectl apply` succeeds, and the run waits for ever. What is
compared is what the manifests ask for, so it cannot differ from them: the head's pod with KubeRay's autoscaler in it, and the
workers' pods. There is no pod that submits, as the operator does that itself (kuberay.py), and no volume claim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from elastic_lm import config_text
from elastic_lm.deploy import choices, kuberay
from elastic_lm.deploy.choices import Deployment
from elastic_lm.deploy.quantities import quantity, told
from elastic_lm.errors import ConfigError

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig

GPUS = "requests.nvidia.com/gpu"
# Names in a quota's `hard`, and what needs less of them beside fewer workers.
LEVERS = {
    **dict.fromkeys(("requests.cpu", "limits.cpu", "cpu"), ", --worker-cpus, workers.num_cpus or --head-cpus"),
    **dict.fromkeys(("requests.memory", "limits.memory", "memory"), ", --worker-memory or --head-memory"),
    GPUS: " or workers.num_gpus",
    **dict.fromkeys(("pods", "count/pods"), ", put more workers into a pod by --workers-per-pod"),
}
SAME = {"cpu": "requests.cpu", "memory": "requests.memory", "count/pods": "pods"}
# Whether a scope holds for pods of ours: they ask for resources, have no deadline, and name no priority class.
SCOPES = {
    "NotTerminating": True,
    "NotBestEffort": True,
    "Terminating": False,
    "BestEffort": False,
    "PriorityClass": False,
    "CrossNamespacePodAffinity": False,
    "VolumeAttributesClass": False,
}
OPERATORS = {"In": True, "Exists": True, "NotIn": False, "DoesNotExist": False}

Amounts = dict[str, Fraction]


@dataclass(frozen=True)
class Demand:
    """What a deployment takes of a quota: a head, and from `least` to `most` worker pods. `bound` is what sets `least`."""

    head: Amounts
    worker: Amounts
    least: int
    most: int
    bound: str

    @classmethod
    def of(cls, config: RunConfig, deployment: Deployment) -> Demand:
        """As the manifests have it. All groups have the same pods, but for the nodes that they go to."""
        spec = kuberay.cluster_spec(config, deployment)
        autoscaler = {"resources": spec["autoscalerOptions"]["resources"]}
        groups = spec["workerGroupSpecs"]
        head, worker = (group["template"]["spec"]["containers"] for group in (spec["headGroupSpec"], groups[0]))
        least, most = choices.pods_of(config, deployment)
        kept = sum(group["minReplicas"] for group in groups)
        return cls(
            head=_taken_by([*head, autoscaler]),
            worker=_taken_by(worker),
            least=max(least, kept),
            most=max(kept, min(most, sum(group["maxReplicas"] for group in groups))),
            bound="--min-pods" if kept > least else "workers.min",
        )

    def total(self, resource: str, num_pods: int) -> Fraction:
        """Of the head and so many worker pods."""
        head, worker = self.each(resource)
        return head + num_pods * worker

    def each(self, resource: str) -> tuple[Fraction, Fraction]:
        """Of the head, and of one worker pod. `resource`: as a quota calls it."""
        name = SAME.get(resource, resource)
        return self.head.get(name, Fraction(0)), self.worker.get(name, Fraction(0))


@dataclass(frozen=True)
class Quota:
    """A ResourceQuota: what its namespace may have of each resource, and has already. Amounts as they are written."""

    name: str
    namespace: str | None
    hard: dict[str, Any]
    used: dict[str, Any]
    foreign: tuple[str, ...] = ()
    """Scopes by which it counts other pods than ours."""

    def left(self, resource: str) -> Fraction:
        return quantity(self.hard[resource]) - quantity(self.used.get(resource, 0))

    def missing(self, demand: Demand) -> Iterator[tuple[str, int]]:
        """(resource, worker pods that have room beside the head) of all that do not hold `most` of them."""
        for resource in self.hard:
            needed = demand.total(resource, demand.most) if resource in LEVERS else 0
            if needed and needed > self.left(resource):
                head, worker = demand.each(resource)
                yield resource, (self.left(resource) - head) // worker

    def allows(self, resource: str) -> str:
        used = f", of which {self.used[resource]} is used" if quantity(self.used.get(resource, 0)) else ""
        return f"{self.hard[resource]} is allowed{used}"


def check(config: RunConfig, deployment: Deployment, path: str) -> list[str]:
    """Compare with the quotas in the file at `path`.    Returns: sentences about what is worth to know.

    Raises: ConfigError, with a line for each resource of which there is too little for the run's minimum, or when the file
    cannot be what it should.
    """
    demand = Demand.of(config, deployment)
    refused: list[str] = []
    notes: list[str] = []
    for quota in _of_namespace(load(path), deployment.namespace, path):
        if quota.foreign:
            notes.append(
                f"quota {quota.name} is for other pods ({', '.join(quota.foreign)}) than these, which have requests, no "
                "deadline and no priority class; it was not compared"
            )
            continue
        for resource, room in quota.missing(demand):
            (refused if room < demand.least else notes).append(_sentence(quota, resource, room, demand))
    if refused:
        raise ConfigError("\n".join(refused))
    return notes


def load(path: str) -> list[Quota]:
    """Every ResourceQuota in a YAML file, also those in a List.    Raises: ConfigError."""
    objects = [
        found
        for document in config_text.documents(config_text.text_of(path, "quotas"), path)
        if document is not None
        for found in _members(document, path)
    ]
    quotas = [_quota(found, path) for found in objects if _kind(found) == "v1 ResourceQuota"]
    if not quotas:
        kinds = ", ".join(sorted({_kind(found) for found in objects})) or "nothing"
        raise ConfigError(
            f"{path} holds no v1 ResourceQuota, but {kinds}; write one with `kubectl get resourcequota -o yaml`, and where the "
            "namespace has none, leave --quota out"
        )
    return quotas


# -- parts -----------------------------------------------------------------------------------------------------------


def _taken_by(containers: list[dict[str, Any]]) -> Amounts:
    """By a pod with these containers."""
    amounts: Amounts = defaultdict(Fraction, pods=Fraction(1))
    for container in containers:
        for side, resources in container["resources"].items():
            for name, amount in resources.items():
                amounts[f"{side}.{name}"] += quantity(amount)
    return dict(amounts)


def _sentence(quota: Quota, resource: str, room: int, demand: Demand) -> str:
    fatal, memory = room < demand.least, resource.endswith("memory")
    num_pods = demand.least if fatal else demand.most
    head, worker = demand.each(resource)
    parts = [f"{told(head, memory=memory)} for the head"] if head else []
    parts += [f"{num_pods} x {told(worker, memory=memory)} for worker pods"]
    need = f"{resource} needs {told(demand.total(resource, num_pods), memory=memory)} ({', '.join(parts)})"
    if not fatal:
        return (
            f"quota {quota.name} has no room for all of the run's pods: {need}, and {quota.allows(resource)}; at most {room} of "
            f"{demand.most} worker pods will be there; lower workers.max, or raise the quota"
        )
    free = " free what is used," if quantity(quota.used.get(resource, 0)) else ""
    return (
        f"quota {quota.name} has no room for the least that the run needs: {need}, and {quota.allows(resource)}; lower "
        f"{demand.bound}{LEVERS[resource]},{free} or raise the quota"
    )


def _of_namespace(quotas: list[Quota], namespace: str | None, path: str) -> list[Quota]:
    """Those of the deployment's namespace."""
    spaces = sorted({quota.namespace for quota in quotas if quota.namespace is not None})
    if namespace is None:
        if len(spaces) > 1:
            raise ConfigError(f"{path} holds quotas of {', '.join(spaces)}; say by --namespace which one is meant")
        return quotas
    found = [quota for quota in quotas if quota.namespace in (None, namespace)]
    if not found:
        raise ConfigError(
            f"{path} holds quotas of {', '.join(spaces)}, and --namespace is {namespace}; write them with "
            f"`kubectl get resourcequota -n {namespace} -o yaml`"
        )
    return found


def _members(document: Any, path: str) -> list[dict[str, Any]]:
    """A document's objects: itself, or what a List has in it."""
    is_list = isinstance(document, dict) and str(document.get("kind", "")).endswith("List")
    members = (document.get("items") or []) if is_list else [document]
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise ConfigError(
            f"{path} holds something that is no object of Kubernetes: each has apiVersion, kind and metadata"
        )
    return members


def _kind(found: dict[str, Any]) -> str:
    return f"{found.get('apiVersion', '')} {found.get('kind', 'an object without a kind')}".strip()


def _quota(found: dict[str, Any], path: str) -> Quota:
    metadata, spec = _section(found, "metadata", path), _section(found, "spec", path)
    name, namespace = metadata.get("name"), metadata.get("namespace")
    if not isinstance(name, str) or not isinstance(namespace, (str, type(None))):
        raise ConfigError(f"{path} holds a ResourceQuota without metadata.name, or with a namespace that is no text")
    where = f"{path}: quota {name}"
    hard = _section(spec, "hard", where)
    used = _section(_section(found, "status", where), "used", where)
    for part, amounts in (("spec.hard", hard), ("status.used", used)):
        for resource, amount in amounts.items():
            _check_amount(resource, amount, f"{where}: {part}")
    return Quota(name, namespace, hard, used, tuple(_foreign(spec, where)))


def _section(values: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: {name} is a {type(section).__name__}, and must be a mapping")
    return section


def _check_amount(resource: Any, amount: Any, where: str) -> None:
    """As Kubernetes checks a quota: nothing below 0, and things that are counted whole."""
    try:
        found = quantity(amount)
    except ConfigError as error:
        raise ConfigError(f"{where}.{resource}: {error}") from error
    counted = resource in ("pods", GPUS) or str(resource).startswith("count/")
    if found < 0 or (counted and found.denominator != 1):
        rule = "is below 0" if found < 0 else "is no whole number"
        raise ConfigError(f"{where}.{resource}: {amount} {rule}, which Kubernetes takes for no quota; correct it")


def _foreign(spec: dict[str, Any], where: str) -> Iterator[str]:
    """Scopes, and expressions of the scope selector, by which the quota counts other pods."""
    selector = _section(spec, "scopeSelector", where).get("matchExpressions") or []
    scopes = spec.get("scopes") or []
    if not isinstance(scopes, list) or not isinstance(selector, list):
        raise ConfigError(f"{where}: scopes and scopeSelector.matchExpressions must be lists")
    terms: list[tuple[Any, Any]] = [(scope, "Exists") for scope in scopes]
    terms += [
        (term.get("scopeName"), term.get("operator")) if isinstance(term, dict) else (None, None) for term in selector
    ]
    for scope, operator in terms:
        if not isinstance(scope, str) or scope not in SCOPES or operator not in tuple(OPERATORS):
            raise ConfigError(
                f"{where}: {scope!r} with {operator!r} is no scope of Kubernetes; scopes are {', '.join(SCOPES)}, and "
                f"operators {', '.join(OPERATORS)}"
            )
        if SCOPES[scope] != OPERATORS[operator]:
            yield scope if operator == "Exists" else f"{scope} {operator}"
