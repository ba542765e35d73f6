"""Rules of KubeRay's operator that the schemas of its objects cannot express, as a lint.

The operator refuses an object that breaks one when it is there already: `kubectl apply` succeeds, and the RayJob's status says
ValidationFailed. Stated after the operator's version 1.7; rules about features that are not used here are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MAX_NAME = {"RayJob": 47, "RayCluster": 53}
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
NEEDS_TOKEN, NEEDS_PRIORITY = (2, 52, 0), (2, 56, 0)
START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")


def broken(document: dict[str, Any]) -> list[str]:
    """A sentence for every rule that a RayJob or RayCluster breaks."""
    name, spec = document["metadata"]["name"], document["spec"]
    found = list(_name(document["kind"], name))
    if document["kind"] == "RayJob":
        found += _job(spec)
        spec = spec.get("rayClusterSpec")
    return found if spec is None else [*found, *_cluster(spec)]


def _name(kind: str, name: str) -> Iterator[str]:
    if len(name) > MAX_NAME[kind]:
        yield f"metadata.name={name!r} has {len(name)} characters; a {kind} may have {MAX_NAME[kind]}"
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        yield f"metadata.name={name!r} is no DNS label that begins with a letter"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    shuts_down, selector = spec.get("shutdownAfterJobFinishes", False), spec.get("clusterSelector")
    retries, mode = spec.get("backoffLimit", 0), spec.get("submissionMode", "K8sJobMode")
    if "rayClusterSpec" not in spec and not selector:
        yield "one of rayClusterSpec and clusterSelector must be there"
    if spec.get("suspend") and not shuts_down:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and selector:
        yield "suspend does not go with clusterSelector"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is negative"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if retries < 0:
        yield "backoffLimit is negative"
    if retries > 0 and (selector or mode == "InteractiveMode"):
        yield "backoffLimit goes with neither clusterSelector nor InteractiveMode"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} is not above 0"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec or selector):
        yield "SidecarMode goes with no submitterPodTemplate, submitterConfig or clusterSelector"
    yield from _deletion(spec.get("deletionStrategy"), shuts_down)


def _deletion(strategy: dict[str, Any] | None, shuts_down: bool) -> Iterator[str]:
    if strategy is None:
        return
    by_outcome = [field for field in ("onSuccess", "onFailure") if field in strategy]
    if strategy.get("deletionRules") and shuts_down:
        yield "deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude each other"
    if strategy.get("deletionRules") and by_outcome:
        yield "deletionStrategy has deletionRules and onSuccess or onFailure; one of the two"
    if not strategy.get("deletionRules") and len(by_outcome) != 2:
        yield "deletionStrategy needs both onSuccess and onFailure, or deletionRules"


def _cluster(spec: dict[str, Any]) -> Iterator[str]:
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    version, autoscaled = spec.get("rayVersion", ""), spec.get("enableInTreeAutoscaling", False)
    options = spec.get("autoscalerOptions", {})
    v2_by_variable = _variable(head, AUTOSCALER_V2) in ("1", "true")
    v2 = autoscaled and (options.get("version") == "v2" or v2_by_variable)
    if v2_by_variable and not autoscaled:
        yield f"{AUTOSCALER_V2} needs enableInTreeAutoscaling"
    if autoscaled and "version" in options and _variable(head, AUTOSCALER_V2) is not None:
        yield f"autoscalerOptions.version and {AUTOSCALER_V2} are both set; one of the two"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if any(variable["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for variable in options.get("env", [])):
        yield "autoscalerOptions.env sets KUBERAY_GEN_AUTOSCALER_START_CMD, which is KubeRay's"
    names = [group["groupName"] for group in groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two worker groups are called {name!r}"
    for place, group in (("head", head), *zip(names, groups, strict=True)):
        yield from _group(place, group, v2)
    for group in groups:
        yield from _replicas(group, autoscaled)
        yield from _scaling(group, v2, autoscaled, version)
    yield from _token(spec.get("authOptions", {}), version)


def _group(place: str, group: dict[str, Any], v2: bool) -> Iterator[str]:
    """What holds for the head and for workers."""
    start, pod = group.get("rayStartParams", {}), group["template"]["spec"]
    if not pod.get("containers"):
        yield f"{place}: no container"
    if group.get("resources") and any(name in start for name in START_RESOURCES):
        yield f"{place}: resources are in rayStartParams and in resources; one of the two"
    if "labels" in start:
        yield f"{place}: rayStartParams.labels is not supported; use labels"
    if v2 and pod.get("restartPolicy", "Never") != "Never":
        yield f"{place}: autoscaler v2 needs restartPolicy Never, not {pod['restartPolicy']}"


def _replicas(group: dict[str, Any], autoscaled: bool) -> Iterator[str]:
    name, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
    if not autoscaled and (least is None or most is None):
        yield f"{name}: minReplicas and maxReplicas are needed without an autoscaler"
    if (least or 0) < 0 or (most or 0) < 0:
        yield f"{name}: a negative number of replicas"
    if least is not None and most is not None and not least <= group.get("replicas", least) <= most:
        yield f"{name}: not minReplicas={least} <= replicas={group.get('replicas', least)} <= maxReplicas={most}"


def _scaling(group: dict[str, Any], v2: bool, autoscaled: bool, version: str) -> Iterator[str]:
    name = group["groupName"]
    if group.get("priority") and not v2:
        yield f"{name}: priority needs autoscaler v2"
    if group.get("priority") and _parsed(version) < NEEDS_PRIORITY:
        yield f"{name}: priority needs rayVersion 2.56.0 or later, not {version or 'none'}"
    if "idleTimeoutSeconds" in group and (not v2 or group["idleTimeoutSeconds"] < 0):
        yield f"{name}: idleTimeoutSeconds needs autoscaler v2 and must not be negative"
    if group.get("suspend") and autoscaled:
        yield f"{name}: suspend does not go with an autoscaler"


def _token(options: dict[str, Any], version: str) -> Iterator[str]:
    if options.get("mode") == "token" and _parsed(version) < NEEDS_TOKEN:
        yield f"authOptions.mode token needs rayVersion 2.52.0 or later, not {version or 'none'}"
    if options.get("enableK8sTokenAuth") and options.get("mode") != "token":
        yield "authOptions.enableK8sTokenAuth needs mode token"
    if options.get("enableK8sTokenAuth") and options.get("secretName"):
        yield "authOptions has enableK8sTokenAuth and secretName; one of the two"


def _variable(group: dict[str, Any], name: str) -> str | None:
    """A variable of the group's Ray container."""
    for container in group["template"]["spec"].get("containers", [])[:1]:
        for variable in container.get("env", []):
            if variable["name"] == name:
                return str(variable.get("value", ""))
    return None


def _parsed(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else (0,)
