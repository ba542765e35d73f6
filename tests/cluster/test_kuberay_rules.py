"""The operator's rules as a lint: every rule has an object that breaks it and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from elastic_lm.deploy import rules

POD: dict[str, Any] = {"spec": {"containers": [{"name": "ray", "image": "ray"}]}}
CLUSTER: dict[str, Any] = {
    "rayVersion": "2.60.0",
    "enableInTreeAutoscaling": True,
    "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 60},
    "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": POD},
    "workerGroupSpecs": [
        {"groupName": "a", "replicas": 1, "minReplicas": 1, "maxReplicas": 2, "priority": 1, "template": POD},
        {"groupName": "b", "minReplicas": 0, "maxReplicas": 2, "template": POD},
    ],
}
JOB: dict[str, Any] = {
    "kind": "RayJob",
    "metadata": {"name": "a-run"},
    "spec": {
        "submissionMode": "HTTPMode",
        "backoffLimit": 2,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 60,
        "rayClusterSpec": CLUSTER,
    },
}
Spoil = Callable[
    [dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]], object
]  # (job, cluster, head, group a)


def variable(group: dict[str, Any], name: str, value: str) -> None:
    group["template"]["spec"]["containers"][0]["env"] = [{"name": name, "value": value}]


BREAKS: dict[str, tuple[Spoil, str]] = {
    "no cluster": (lambda j, c, h, g: j.pop("rayClusterSpec"), "one of rayClusterSpec and clusterSelector"),
    "suspend and no shutdown": (
        lambda j, c, h, g: j.update(suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0),
        "suspend needs shutdownAfterJobFinishes",
    ),
    "suspend of another's cluster": (
        lambda j, c, h, g: j.update(suspend=True, backoffLimit=0, clusterSelector={"ray.io/cluster": "x"}),
        "suspend does not go with clusterSelector",
    ),
    "ttl below 0": (lambda j, c, h, g: j.update(ttlSecondsAfterFinished=-1), "ttlSecondsAfterFinished is negative"),
    "ttl and no shutdown": (
        lambda j, c, h, g: j.update(shutdownAfterJobFinishes=False),
        "ttlSecondsAfterFinished needs",
    ),
    "retries below 0": (lambda j, c, h, g: j.update(backoffLimit=-1), "backoffLimit is negative"),
    "retries by hand": (
        lambda j, c, h, g: j.update(submissionMode="InteractiveMode"),
        "backoffLimit goes with neither",
    ),
    "deadline 0": (lambda j, c, h, g: j.update(activeDeadlineSeconds=0), "activeDeadlineSeconds is not above 0"),
    "sidecar with a template": (
        lambda j, c, h, g: j.update(submissionMode="SidecarMode", submitterPodTemplate={}),
        "SidecarMode goes with no",
    ),
    "deletion twice": (
        lambda j, c, h, g: j.update(deletionStrategy={"deletionRules": [{}]}),
        "deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude",
    ),
    "deletion both ways": (
        lambda j, c, h, g: j.update(
            shutdownAfterJobFinishes=False,
            ttlSecondsAfterFinished=0,
            deletionStrategy={"deletionRules": [{}], "onSuccess": {}},
        ),
        "one of the two",
    ),
    "deletion by half": (lambda j, c, h, g: j.update(deletionStrategy={"onSuccess": {}}), "needs both onSuccess"),
    "v2 by variable alone": (
        lambda j, c, h, g: (
            c.update(enableInTreeAutoscaling=False),
            g.pop("priority"),
            variable(h, rules.AUTOSCALER_V2, "1"),
        ),
        "needs enableInTreeAutoscaling",
    ),
    "v2 twice": (lambda j, c, h, g: variable(h, rules.AUTOSCALER_V2, "true"), "are both set"),
    "idle below 0": (lambda j, c, h, g: c["autoscalerOptions"].update(idleTimeoutSeconds=-1), "is negative"),
    "KubeRay's variable": (
        lambda j, c, h, g: c["autoscalerOptions"].update(env=[{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}]),
        "which is KubeRay's",
    ),
    "one name twice": (lambda j, c, h, g: g.update(groupName="b"), "two worker groups are called 'b'"),
    "no container": (lambda j, c, h, g: g["template"]["spec"].update(containers=[]), "a: no container"),
    "resources twice": (
        lambda j, c, h, g: h.update(resources={"CPU": "1"}),
        "head: resources are in rayStartParams and in resources",
    ),
    "labels in start parameters": (
        lambda j, c, h, g: g.update(rayStartParams={"labels": "x=y"}),
        "a: rayStartParams.labels is not supported",
    ),
    "pods that restart": (
        lambda j, c, h, g: g["template"]["spec"].update(restartPolicy="Always"),
        "a: autoscaler v2 needs restartPolicy Never",
    ),
    "no range": (
        lambda j, c, h, g: (c.update(enableInTreeAutoscaling=False), g.pop("priority"), g.pop("maxReplicas")),
        "a: minReplicas and maxReplicas are needed",
    ),
    "replicas below 0": (lambda j, c, h, g: g.update(minReplicas=-1), "a: a negative number"),
    "min above max": (lambda j, c, h, g: g.update(minReplicas=3, replicas=3), "a: not minReplicas=3 <= replicas=3"),
    "replicas above max": (lambda j, c, h, g: g.update(replicas=3), "<= replicas=3 <= maxReplicas=2"),
    "priority for v1": (
        lambda j, c, h, g: c["autoscalerOptions"].update(version="v1"),
        "a: priority needs autoscaler v2",
    ),
    "priority for an old Ray": (
        lambda j, c, h, g: c.update(rayVersion="2.55.1"),
        "a: priority needs rayVersion 2.56.0",
    ),
    "priority for any Ray": (lambda j, c, h, g: c.pop("rayVersion"), "not none"),
    "idle time for v1": (
        lambda j, c, h, g: (
            g.pop("priority"),
            g.update(idleTimeoutSeconds=5),
            c["autoscalerOptions"].update(version="v1"),
        ),
        "a: idleTimeoutSeconds needs autoscaler v2",
    ),
    "suspended group": (lambda j, c, h, g: g.update(suspend=True), "a: suspend does not go with an autoscaler"),
    "token for an old Ray": (
        lambda j, c, h, g: (g.pop("priority"), c.update(rayVersion="2.51.0", authOptions={"mode": "token"})),
        "token needs rayVersion 2.52.0",
    ),
    "Kubernetes' token without one": (
        lambda j, c, h, g: c.update(authOptions={"enableK8sTokenAuth": True}),
        "enableK8sTokenAuth needs mode token",
    ),
    "two tokens": (
        lambda j, c, h, g: c.update(authOptions={"mode": "token", "enableK8sTokenAuth": True, "secretName": "x"}),
        "one of the two",
    ),
}


def test_what_breaks_no_rule_is_left_alone() -> None:
    assert rules.broken(JOB) == []
    assert rules.broken({"kind": "RayCluster", "metadata": {"name": "c" * 53}, "spec": CLUSTER}) == []
    assert rules.broken({"kind": "RayJob", "metadata": {"name": "j" * 47}, "spec": JOB["spec"]}) == []


@pytest.mark.parametrize("case", BREAKS)
def test_broken_rule_is_told(case: str) -> None:
    spoil, told = BREAKS[case]
    document = json.loads(json.dumps(JOB))  # a copy in which the groups share no pod
    cluster = document["spec"]["rayClusterSpec"]
    spoil(document["spec"], cluster, cluster["headGroupSpec"], cluster["workerGroupSpecs"][0])
    (sentence,) = rules.broken(document)
    assert told in sentence


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("RayJob", "j" * 48),
        ("RayCluster", "c" * 54),
        ("RayJob", "1a"),
        ("RayJob", "a.b"),
        ("RayJob", "A"),
        ("RayJob", "a-"),
    ],
)
def test_name_that_kuberay_refuses_is_told(kind: str, name: str) -> None:
    spec = JOB["spec"] if kind == "RayJob" else CLUSTER
    (sentence,) = rules.broken({"kind": kind, "metadata": {"name": name}, "spec": spec})
    assert sentence.startswith(f"metadata.name={name!r}")
