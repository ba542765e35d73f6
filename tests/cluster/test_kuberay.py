"""Manifests for KubeRay: accepted whole by closed schemas and the operator's rules, and they say what the run's config says.

There is no Kubernetes here. What is checked is what an API server and the operator check before a pod is made, and that every
manifest keeps the promises of docs/operations.md; that the pods then run is not.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lm import RunConfig, __version__
from elastic_lm.deploy import kuberay, pods
from elastic_lm.deploy.choices import RAY_VERSION, Deployment, groups_of, label_of, mebibytes
from elastic_lm.errors import ConfigError
from elastic_lm.terminal import Exit
from tests.cluster.schemas import (
    KUBERAY,
    ROOT,
    cluster_spec,
    containers,
    pod_specs,
    problems,
    rendered,
    schema_errors,
)
from tests.test_cli import run

SPOT = (("karpenter.sh/capacity-type", "spot"),)
KINDS = ("rayjob", "raycluster")
FOLDERS = ("base", "long-lived", "overlays/kind-cpu", "overlays/gpu-spot")


def config(*overrides: str, **workers: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "first",
        "storage": "s3://bucket/prefix",
        "data": {"tokens": "s3://bucket/tokens"},
        "model": {"preset": "tiny"},
        "batch": {"micro_batches": 16, "micro_batch_size": 2, "sequence_length": 16},
        "training": {"steps": 100},
        "workers": {"min": 2, "max": 8, **workers},
    }
    return RunConfig(**values).replace(*overrides)


def deployment(**choices: Any) -> Deployment:
    return Deployment(**{"name": "first", "image": "elastic-lm:1", **choices})


def of(kind: str, objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [document for document in objects if document["kind"] == kind]
    return found


def ray_job(run_config: RunConfig | None = None, **choices: Any) -> dict[str, Any]:
    return of("RayJob", kuberay.documents(run_config or config(), deployment(**choices), "rayjob"))


def groups_in(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster_spec(document)["workerGroupSpecs"]}


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "spot": {"spot_labels": SPOT, "spot_taints": (("spot", "yes"), ("any", ""))},
    "secrets": {"s3_secret": "s3", "auth_secret": "token", "service_account": "trainer", "namespace": "team"},
    "own token": {"token_auth": True},
    "several workers in a pod": {"workers_per_pod": 4, "worker_cpus": 16, "worker_memory": "512Mi", "s3_port": 9000},
}
CONFIGS = {
    "cpu": config(),
    "gpu": config(num_gpus=1.0, num_cpus=3.5),
    "shared gpu and a custom resource": config(num_gpus=0.25, resources={"fast_network": 0.5}),
    "no metrics": config("metrics.port=null"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("run_config", CONFIGS)
def test_every_object_is_one_that_a_cluster_takes(run_config: str, choices: str, kind: str) -> None:
    objects = kuberay.documents(CONFIGS[run_config], deployment(**CHOICES[choices]), kind)
    assert [document["kind"].lower() for document in objects] == ["configmap", "networkpolicy", kind]
    assert [problem for document in objects for problem in problems(document)] == []


def test_text_is_the_objects_with_a_comment() -> None:
    objects = kuberay.documents(config(), deployment(spot_labels=SPOT), "rayjob")
    text = kuberay.as_text(objects, "one\n\ntwo")
    assert text.startswith("# one\n#\n# two\n---\n")
    assert list(yaml.safe_load_all(text)) == objects
    assert "&id" not in text


# -- the schemas can refuse ------------------------------------------------------------------------------------------


def spec_of_worker(document: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    return pod


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: d["spec"].update(backOffLimit=1), "backOffLimit"),
        (lambda d: d["spec"]["rayClusterSpec"].update(rayversion="2"), "rayversion"),
        (lambda d: spec_of_worker(d).update(restartpolicy="Never"), "restartpolicy"),
        (lambda d: spec_of_worker(d)["containers"][0].update(envfrom=[]), "envfrom"),
        (lambda d: spec_of_worker(d)["securityContext"].update(runAsNonroot=True), "runAsNonroot"),
        (lambda d: spec_of_worker(d).update(terminationGracePeriodSeconds="70"), "'70'"),
        (lambda d: d["spec"]["rayClusterSpec"]["autoscalerOptions"].update(version="v3"), "v3"),
        (lambda d: d["spec"].update(backoffLimit=2**31), "2147483648"),
        (lambda d: spec_of_worker(d)["containers"][0]["resources"]["limits"].update(cpu=1.5), "1.5"),
        (lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"].pop("template"), "template"),
    ],
)
def test_closed_schema_refuses_what_is_misspelt(spoil: Any, told: str) -> None:
    document = copy.deepcopy(ray_job())
    assert schema_errors(document) == []
    spoil(document)
    assert any(told in error for error in schema_errors(document))


def test_schema_of_a_builtin_kind_refuses_what_is_misspelt() -> None:
    policy = copy.deepcopy(of("NetworkPolicy", kuberay.documents(config(), deployment(), "rayjob")))
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    assert problems(policy)


# -- the elastic range -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "most", "each", "expected"),
    [
        (2, 8, 1, {"workers": (2, 8)}),
        (3, 3, 1, {"workers": (3, 3)}),
        (1, 9, 4, {"workers": (1, 3)}),  # 9 workers, 4 in a pod
        (8, 16, 8, {"workers": (1, 2)}),
    ],
)
def test_group_has_the_pods_that_the_range_needs(
    least: int, most: int, each: int, expected: dict[str, tuple[int, int]]
) -> None:
    found = groups_in(ray_job(config(min=least, max=most), workers_per_pod=each))
    assert {name: (group["minReplicas"], group["maxReplicas"]) for name, group in found.items()} == expected


def test_minimum_stays_and_all_beyond_it_is_spot_first() -> None:
    found = groups_in(ray_job(spot_labels=SPOT))
    assert {name: (group["minReplicas"], group["maxReplicas"]) for name, group in found.items()} == {
        "spot": (0, 8),
        "on-demand": (2, 8),
    }
    assert found["spot"]["priority"] > found["on-demand"]["priority"] > 0


def test_limits_of_groups_are_kept() -> None:
    found = groups_in(ray_job(spot_labels=SPOT, spot_max_pods=5, max_pods=3, min_pods=0))
    assert [(group["minReplicas"], group["maxReplicas"]) for group in found.values()] == [(0, 5), (0, 3)]


@pytest.mark.parametrize(
    ("workers", "each", "cpus", "gpus"),
    [
        ({}, 1, "1", None),
        ({"num_cpus": 3.5, "num_gpus": 1.0}, 1, "4", "1"),
        ({"num_cpus": 0.1}, 3, "1", None),  # 0.30000000000000004 is no whole CPU, and a pod without one is none
        ({"num_cpus": 0.0, "num_gpus": 0.25}, 4, "1", "1"),
        ({"num_cpus": 8.0, "num_gpus": 1.0}, 8, "64", "8"),
    ],
)
def test_pod_holds_its_workers(workers: dict[str, float], each: int, cpus: str, gpus: str | None) -> None:
    (group,) = groups_in(ray_job(config(**workers), workers_per_pod=each)).values()
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["cpu"] == cpus
    assert resources["limits"].get("nvidia.com/gpu") == gpus


def test_custom_resources_are_those_of_all_workers_in_a_pod() -> None:
    (group,) = groups_in(ray_job(config(resources={"link": 0.5}), workers_per_pod=4)).values()
    assert group["resources"] == {"link": "2"}


def test_head_takes_no_work_and_no_spot_machine() -> None:
    spec = cluster_spec(ray_job(spot_labels=SPOT))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    off = {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": SPOT[0][0], "operator": "NotIn", "values": [SPOT[0][1]]}]}
            ]
        }
    }
    spot, on_demand = spec["workerGroupSpecs"]
    assert spec["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"] == off
    assert on_demand["template"]["spec"]["affinity"]["nodeAffinity"] == off
    assert spot["template"]["spec"]["nodeSelector"] == dict(SPOT)
    assert "affinity" not in spot["template"]["spec"]


def test_node_with_one_of_two_labels_is_no_spot_node() -> None:
    """Terms are alternatives; the expressions of one are all needed."""
    head = cluster_spec(ray_job(spot_labels=(("a", "1"), ("b", "2"))))["headGroupSpec"]["template"]["spec"]
    terms = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [[(one["key"], one["values"]) for one in term["matchExpressions"]] for term in terms] == [
        [("a", ["1"])],
        [("b", ["2"])],
    ]


def test_spot_pods_tolerate_the_taints_of_their_nodes() -> None:
    found = groups_in(ray_job(config(num_gpus=1.0), spot_labels=SPOT, spot_taints=(("a", "b"), ("c", ""))))
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert found["spot"]["template"]["spec"]["tolerations"] == [
        {"key": "a", "operator": "Equal", "value": "b"},
        {"key": "c", "operator": "Exists"},
        gpu,
    ]
    assert found["on-demand"]["template"]["spec"]["tolerations"] == [gpu]


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drain_s", [30, 60, 600])
def test_grace_period_is_above_the_drain_deadline(drain_s: int) -> None:
    document = ray_job(drain_s=drain_s)
    for name, pod in pod_specs(document):
        variables = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
        assert pod["terminationGracePeriodSeconds"] >= int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) + 10, (
            name
        )
        assert variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(drain_s)
    environment = yaml.safe_load(document["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment == {"RAY_JOB_STOP_WAIT_TIME_S": str(drain_s)}


def test_failed_job_is_begun_again_and_ends_with_its_cluster() -> None:
    spec = ray_job(retries=7)["spec"]
    assert spec["backoffLimit"] == 7
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["rayClusterSpec"]["rayVersion"] == RAY_VERSION
    assert spec["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize(("code", "succeeds"), [(0, True), (5, True), (1, False), (2, False), (4, False), (137, False)])
def test_stop_on_request_is_no_failure(code: int, succeeds: bool, tmp_path: Path) -> None:
    """Ray runs the entrypoint in a shell. A stop that counted as a failure would be begun again by backoffLimit."""
    import subprocess

    program = tmp_path / "elastic-lm"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit {code}\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-c", ray_job()["spec"]["entrypoint"]], env={"PATH": f"{tmp_path}:/bin"}, timeout=20
    )
    assert (done.returncode == 0) is succeeds
    assert (tmp_path / "arguments").read_text() == "train /etc/elastic-lm/run.yaml --set metrics.host=0.0.0.0\n"
    assert kuberay.STOPPED == Exit.STOPPED


def test_mounted_config_is_the_run(tmp_path: Path) -> None:
    chosen = config("workers.threads=4", "training.skip=[[5, 7]]", "model.dropout=0.1")
    objects = kuberay.documents(chosen, deployment(), "rayjob")
    file = tmp_path / "run.yaml"
    file.write_text(of("ConfigMap", objects)["data"]["run.yaml"])
    assert RunConfig.load(file) == chosen
    for _, pod in pod_specs(objects[-1]):
        (volume,) = [volume for volume in pod["volumes"] if "configMap" in volume]
        assert volume["configMap"]["name"] == of("ConfigMap", objects)["metadata"]["name"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert f"{mounts[volume['name']]}/run.yaml" in objects[-1]["spec"]["entrypoint"]


def test_health_checks_are_those_of_clusters_that_are_started_here() -> None:
    from elastic_lm.runtime.cluster import HEALTH_CHECKS

    assert {f"RAY_{name}": str(value) for name, value in HEALTH_CHECKS.items()} == pods.HEALTH_CHECKS
    head = cluster_spec(ray_job())["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert pods.HEALTH_CHECKS.items() <= {variable["name"]: variable["value"] for variable in head["env"]}.items()


def test_ray_version_is_the_pinned_one() -> None:
    assert f"\nray=={RAY_VERSION}\n" in (ROOT / "constraints.txt").read_text()


# -- security --------------------------------------------------------------------------------------------------------


def insecure(document: dict[str, Any]) -> list[str]:
    """What a pod of this object may do that none should: what the `restricted` standard refuses, and writing to its image."""
    found = []
    for name, pod in pod_specs(document):
        shared = pod.get("securityContext", {})
        if not (shared.get("runAsNonRoot") and shared.get("runAsUser", 0) > 0):
            found.append(f"{name}: may be root")
        if shared.get("seccompProfile") != {"type": "RuntimeDefault"}:
            found.append(f"{name}: no seccomp profile")
        if any(pod.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
            found.append(f"{name}: shares a namespace with its node")
        if "head" not in name and pod.get("automountServiceAccountToken") is not False:
            found.append(f"{name}: has a token of the API server")
        if allowed := {kind for v in pod["volumes"] for kind in v if kind != "name"} - {"configMap", "emptyDir"}:
            found.append(f"{name}: volumes {allowed}")
        found += [f"{name} {c['name']}: {what}" for c in containers(pod) for what in insecure_container(c)]
    if document["kind"] in ("RayJob", "RayCluster"):
        autoscaler = cluster_spec(document)["autoscalerOptions"]
        found += [f"autoscaler: {what}" for what in insecure_container(autoscaler)]
    return found


def insecure_container(container: dict[str, Any]) -> list[str]:
    context = container.get("securityContext", {})
    needed = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True}
    found = [name for name, value in needed.items() if context.get(name) is not value]
    found += [] if context.get("capabilities") == {"drop": ["ALL"]} else ["capabilities"]
    found += ["privileged"] if context.get("privileged") else []
    found += [] if {"cpu", "memory"} <= container["resources"]["limits"].keys() else ["no limits"]
    mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
    return found + ([] if "/tmp" in mounts else ["nothing to write to"])


@pytest.mark.parametrize("choices", CHOICES)
def test_no_pod_may_do_more_than_it_needs(choices: str) -> None:
    for kind in KINDS:
        document = kuberay.documents(config(num_gpus=1.0), deployment(**CHOICES[choices]), kind)[-1]
        assert insecure(document) == []


def test_insecure_pod_would_be_found() -> None:
    document = copy.deepcopy(ray_job())
    del spec_of_worker(document)["securityContext"]["runAsNonRoot"]
    del spec_of_worker(document)["automountServiceAccountToken"]
    spec_of_worker(document)["containers"][0]["securityContext"]["capabilities"]["add"] = ["SYS_PTRACE"]
    document["spec"]["rayClusterSpec"]["autoscalerOptions"].pop("securityContext")
    assert len(insecure(document)) == 3 + 4


def test_shared_memory_holds_the_object_store() -> None:
    """Ray takes 30 % of a pod's memory for it, and falls back to the disk where /dev/shm is smaller."""
    for _, pod in pod_specs(ray_job(worker_memory="24Gi", head_memory="3Gi")):
        (shared,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-memory"]
        memory = mebibytes(pod["containers"][0]["resources"]["limits"]["memory"])
        assert shared["medium"] == "Memory"
        assert 0.3 * memory < mebibytes(shared["sizeLimit"]) < memory
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_secrets_are_named_and_never_held() -> None:
    document = ray_job(s3_secret="s3", auth_secret="token")
    for _, pod in pod_specs(document):
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert cluster_spec(document)["authOptions"] == {"mode": "token", "secretName": "token"}
    text = kuberay.as_text([document], "")
    assert "AWS_" not in text
    assert "RAY_AUTH_MODE" not in text  # KubeRay sets it, and the token, where there is one


def test_without_a_token_ray_is_told_that_there_is_none() -> None:
    """Ray would ask for one by itself."""
    document = ray_job()
    assert "authOptions" not in cluster_spec(document)
    for _, pod in pod_specs(document):
        assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in pod["containers"][0]["env"]


def test_only_those_who_need_to_reach_a_port() -> None:
    policy = of("NetworkPolicy", kuberay.documents(config(), deployment(s3_port=9000), "rayjob"))["spec"]
    own, operator, monitoring = policy["ingress"]
    assert own["from"] == [{"podSelector": policy["podSelector"]}]
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    assert operator["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-system"}
    assert sorted(port["port"] for port in monitoring["ports"]) == [8080, 9464]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert [sorted({port["port"] for port in rule.get("ports", [])}) for rule in policy["egress"]] == [
        [],  # its own pods
        [53],
        [443, 6443, 9000],
    ]


def test_policy_covers_every_pod() -> None:
    objects = kuberay.documents(config(), deployment(), "rayjob")
    selected = of("NetworkPolicy", objects)["spec"]["podSelector"]["matchLabels"].items()
    spec = cluster_spec(objects[-1])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert selected <= group["template"]["metadata"]["labels"].items()


def test_metrics_port_has_the_name_that_scrapers_look_for() -> None:
    head = cluster_spec(ray_job(config("metrics.port=9999")))["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "elastic-lm", "containerPort": 9999} in head["ports"]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"),
    [("first", "first"), ("My.Run_2", "my-run-2"), ("a--b", "a-b"), ("7b", "run-7b"), ("A.", "a"), ("9", "run-9")],
)
def test_label_is_a_dns_label(name: str, label: str) -> None:
    assert label_of(name) == label


@pytest.mark.parametrize("text", ["8", "8G", "8gi", "0Gi", "-1Gi", "1.5Gi", "", "Gi", "8 Gi"])
def test_amount_of_memory_is_whole(text: str) -> None:
    with pytest.raises(ConfigError, match="e.g. 8Gi"):
        mebibytes(text)


def test_amounts_of_memory() -> None:
    assert [mebibytes(text) for text in ("512Mi", "8Gi", "1Ti")] == [512, 8192, 1024 * 1024]


# -- what is checked in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_rendered_objects_are_ones_that_a_cluster_takes(folder: str) -> None:
    objects = rendered(KUBERAY / folder)
    assert {"ConfigMap", "NetworkPolicy"} < {document["kind"] for document in objects}
    assert [problem for document in objects for problem in problems(document)] == []
    assert [what for document in objects for what in insecure(document)] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_rendered_groups_follow_the_rendered_run(folder: str, tmp_path: Path) -> None:
    objects = rendered(KUBERAY / folder)
    file = tmp_path / "run.yaml"
    file.write_text(of("ConfigMap", objects)["data"]["run.yaml"])
    run_config = RunConfig.load(file)
    spot = () if folder == "overlays/kind-cpu" else SPOT
    expected = {g.name: g for g in groups_of(run_config, deployment(spot_labels=spot))}
    found = groups_in(objects[-1] if objects[-1]["kind"].startswith("Ray") else ray_of(objects))
    assert found.keys() == expected.keys()
    for name, group in found.items():
        wanted = expected[name]
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (
            wanted.min_pods,
            wanted.min_pods,
            wanted.max_pods,
        )
        assert group.get("priority", 0) == wanted.priority
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) >= run_config.workers.num_cpus
        assert int(limits.get("nvidia.com/gpu", 0)) == run_config.workers.num_gpus


def ray_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [document for document in objects if document["apiVersion"] == "ray.io/v1"]
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_rendered_objects_fit_each_other(folder: str) -> None:
    """Kustomize does not look into objects of KubeRay: names, images and sizes there must be right by themselves."""
    objects = rendered(KUBERAY / folder)
    there = {(document["kind"], document["metadata"]["name"]) for document in objects}
    namespaces = {d["metadata"].get("namespace") for d in objects if d["kind"] != "Namespace"}
    assert len(namespaces) == 1
    policy = of("NetworkPolicy", objects)["spec"]["podSelector"]["matchLabels"].items()
    for document in objects:
        for _, pod in pod_specs(document):
            mounted = {volume["name"] for volume in pod["volumes"]}
            for volume in pod["volumes"]:
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in there
            for container in containers(pod):
                assert {mount["name"] for mount in container["volumeMounts"]} <= mounted
                image = container["image"].rpartition("/")[2]
                assert image in (f"elastic-lm:{__version__}-cpu", f"elastic-lm:{__version__}-gpu")
                for source in container.get("envFrom", []):
                    assert source["secretRef"]["name"] == "elastic-lm-s3"
        if document["kind"] in ("Deployment", "Job"):
            assert policy <= document["spec"]["template"]["metadata"]["labels"].items()
    for _, pod in pod_specs(ray_of(objects)):
        shared = next(v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shared-memory")
        memory = mebibytes(pod["containers"][0]["resources"]["limits"]["memory"])
        assert mebibytes(shared) == memory // 2


def test_secret_of_the_laptop_overlay_holds_none() -> None:
    import base64

    secret = of("Secret", rendered(KUBERAY / "overlays/kind-cpu"))
    told = {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}
    assert {told[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")} == {"any"}
    assert not [d for folder in FOLDERS[:2] + FOLDERS[3:] for d in rendered(KUBERAY / folder) if d["kind"] == "Secret"]


def generated() -> list[tuple[list[str], Path]]:
    """(arguments of elastic-lm, file) of every line of `make cluster` that writes a manifest."""
    text = (ROOT / "Makefile").read_text()
    shared = next(line for line in text.splitlines() if line.startswith("KUBERAY := ")).removeprefix("KUBERAY := ")
    lines = [line for line in text.splitlines() if line.startswith("\t$(BIN)/elastic-lm $(KUBERAY)")]
    commands = [line.strip().replace("$(KUBERAY)", shared).partition(" > ") for line in lines]
    return [(command.split()[1:], ROOT / file) for command, _, file in commands]


def test_generated_manifests_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(generated()) == 2
    for arguments, file in generated():
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == file.read_text(), f"{file} is out of date: make cluster"
