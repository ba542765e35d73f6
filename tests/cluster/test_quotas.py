"""Quotas of a namespace: what can never have its pods is refused before a line is printed, and what Kubernetes refuses is, too.

The run here needs 4.5 CPUs and 25Gi in 3 pods at least: a head with 2 CPUs and 8Gi, an autoscaler with 500m and 1Gi in its pod,
and 2 workers with a CPU and 8Gi each. With all of its 8 workers it is 10.5 CPUs and 73Gi in 9 pods.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lm.deploy.quantities import quantity, told
from elastic_lm.deploy.quotas import LEVERS, SAME, Demand, check, load
from elastic_lm.errors import ConfigError
from tests.cluster.schemas import cluster_spec, containers, problems
from tests.cluster.test_kuberay import SPOT, config, deployment, ray_job
from tests.test_cli import run, write_config

# As kubectl prints it.
LISTED = """
apiVersion: v1
kind: List
metadata:
  resourceVersion: ""
items:
- apiVersion: v1
  kind: ResourceQuota
  metadata:
    creationTimestamp: "2026-01-05T09:12:44Z"
    name: compute
    namespace: team
    resourceVersion: "8123"
    uid: 3f0c2a52-59f4-4fc5-8b3b-6f1d1a6f2f7e
  spec:
    hard:
      limits.cpu: "16"
      requests.cpu: "16"
      requests.memory: 80Gi
  status:
    hard:
      limits.cpu: "16"
      requests.cpu: "16"
      requests.memory: 80Gi
    used:
      limits.cpu: 4500m
      requests.cpu: "4"
      requests.memory: 4Gi
- apiVersion: v1
  kind: ResourceQuota
  metadata:
    name: objects
    namespace: team
  spec:
    hard:
      pods: "12"
"""


def quota(name: str = "compute", used: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    status = {} if used is None else {"status": {"used": used}}
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": name}, "spec": spec, **status}


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Writes documents, or text, and returns the file's path."""

    def write(*documents: Any) -> str:
        file = tmp_path / "quotas.yaml"
        text = documents[0] if isinstance(documents[0], str) else yaml.safe_dump_all(documents)
        file.write_text(text)
        return str(file)

    return write


# -- amounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "amount"),
    [
        ("4", 4), (4, 4), (1.5, Fraction(3, 2)), ("0", 0), ("+2", 2), ("-1", -1),
        ("500m", Fraction(1, 2)), ("0.1", Fraction(1, 10)), (".5", Fraction(1, 2)), ("2.", 2),
        ("1n", Fraction(1, 10**9)), ("3u", Fraction(3, 10**6)), ("2k", 2000), ("24G", 24 * 10**9), ("1M", 10**6),
        ("24Gi", 24 * 2**30), ("1.5Gi", 3 * 2**29), ("1Ki", 1024), ("512Mi", 2**29), ("2Ti", 2**41), ("1Pi", 2**50),
        ("1Ei", 2**60), ("1e3", 1000), ("1E3", 1000), ("1E", 10**18), ("15e-1", Fraction(3, 2)), ("1E+2", 100), (1e22, 10**22),
    ],
)  # fmt: skip
def test_quantity_is_what_kubernetes_reads(value: Any, amount: int | Fraction) -> None:
    assert quantity(value) == amount


@pytest.mark.parametrize(
    "value",
    [
        "", " 1", "1 Gi", "1GB", "1K", "1ki", "1gi", "1Mib", "m", ".", "Gi", "--1", "1e", "1e1.5", "1e3Gi", "0x10", "1,5",
        "1_000", "٣", "1\n", "inf", float("nan"), float("inf"), None, True, [], {}, "9" * 41, "1e9999",
    ],
)  # fmt: skip
def test_what_kubernetes_does_not_read_is_no_quantity(value: Any) -> None:
    with pytest.raises(ConfigError, match="is no quantity of Kubernetes; write e.g. 4, 500m, 24Gi or 24G"):
        quantity(value)


def test_amounts_are_told_in_a_unit_for_people() -> None:
    assert [told(Fraction(value)) for value in ("4", "9/2", "0")] == ["4", "4.5", "0"]
    assert [told(quantity(value), memory=True) for value in ("25Gi", "1536Mi", "512Mi", "20G")] == [
        "25Gi", "1.5Gi", "512Mi", "18.6265Gi",
    ]  # fmt: skip


# -- what a deployment takes -----------------------------------------------------------------------------------------


def test_demand_is_what_the_manifest_asks_for() -> None:
    """Added up here in another way: over all containers that the rendered RayJob has, pod by pod."""
    run_config, options = config(num_gpus=1.0, num_cpus=3.0), {"spot_labels": SPOT, "worker_memory": "24Gi"}
    document = ray_job(run_config, **options)
    spec = cluster_spec(document)
    assert document["spec"]["submissionMode"] == "HTTPMode"  # no pod of its own submits
    spot, other = spec["workerGroupSpecs"]
    assert (
        spot["template"]["spec"]["containers"][0]["resources"]
        == other["template"]["spec"]["containers"][0]["resources"]
    )
    pods = [spec["headGroupSpec"]["template"], *[other["template"]] * other["minReplicas"]]
    asked = [container["resources"] for pod in pods for container in containers(pod["spec"])]
    asked.append(spec["autoscalerOptions"]["resources"])
    demand = Demand.of(run_config, deployment(**options))
    assert (demand.least, demand.most) == (2, 8)
    for side in ("requests", "limits"):
        for name in ("cpu", "memory", "nvidia.com/gpu"):
            total = sum(quantity(each[side].get(name, 0)) for each in asked)
            assert demand.total(f"{side}.{name}", 2) == total > 0
    assert demand.total("pods", 2) == len(pods)


@pytest.mark.parametrize(
    ("choices", "least", "most", "bound"),
    [
        ({}, 2, 8, "workers.min"),
        ({"workers_per_pod": 3}, 1, 3, "workers.min"),
        ({"min_pods": 0}, 2, 8, "workers.min"),  # the run waits for them, whatever is kept
        ({"min_pods": 5}, 5, 8, "--min-pods"),
        ({"max_pods": 4}, 2, 4, "workers.min"),
        ({"spot_labels": SPOT}, 2, 8, "workers.min"),  # 8 of each group may be, and never more than the run wants
        ({"spot_labels": SPOT, "spot_max_pods": 1, "max_pods": 3}, 2, 4, "workers.min"),
        ({"min_pods": 9, "max_pods": 9}, 9, 9, "--min-pods"),
    ],
)
def test_pods_are_those_that_the_run_needs_and_wants(choices: Any, least: int, most: int, bound: str) -> None:
    demand = Demand.of(config(), deployment(**choices))
    assert (demand.least, demand.most, demand.bound) == (least, most, bound)


def test_every_resource_that_is_compared_is_asked_for() -> None:
    demand = Demand.of(config(num_gpus=1.0), deployment())
    assert all(demand.total(resource, 1) > 0 for resource in LEVERS)
    assert set(SAME) < set(LEVERS)


# -- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resource", "enough", "most"),
    [
        ("requests.cpu", "4500m", "10500m"),
        ("cpu", "4.5", "10.5"),
        ("limits.cpu", "4.5", "11"),
        ("requests.memory", "25Gi", "73Gi"),
        ("memory", "25600Mi", "80G"),
        ("limits.memory", str(25 * 2**30), "73Gi"),
        ("requests.nvidia.com/gpu", "2", "8"),
        ("pods", "3", "9"),
        ("count/pods", 3, 9),
    ],
)
def test_minimum_that_just_fits_is_taken_and_the_least_bit_less_refused(
    resource: str, enough: Any, most: Any, written: Any
) -> None:
    run_config = config(num_gpus=1.0)
    assert check(run_config, deployment(), written(quota(hard={resource: most}))) == []
    (note,) = check(run_config, deployment(), written(quota(hard={resource: enough})))
    assert "at most 2 of 8 worker pods will be there; lower workers.max" in note
    step = 1 if resource in ("pods", "count/pods", "requests.nvidia.com/gpu") else Fraction(1, 1000)
    less = quantity(enough) - step
    file = written(quota(hard={resource: f"{less * 1000}m" if step != 1 else int(less)}))
    with pytest.raises(
        ConfigError, match=f"quota compute has no room for the least that the run needs: {resource} needs"
    ):
        check(run_config, deployment(), file)


@pytest.mark.parametrize(
    ("hard", "used", "told"),
    [
        (
            {"requests.memory": "20Gi"},
            None,
            "quota compute has no room for the least that the run needs: requests.memory needs 25Gi (9Gi for the head, 2 x 8Gi "
            "for worker pods), and 20Gi is allowed; lower workers.min, --worker-memory or --head-memory, or raise the quota",
        ),
        (
            {"limits.cpu": "6"},
            {"limits.cpu": "2500m"},
            "limits.cpu needs 4.5 (2.5 for the head, 2 x 1 for worker pods), and 6 is allowed, of which 2500m is used; lower "
            "workers.min, --worker-cpus, workers.num_cpus or --head-cpus, free what is used, or raise the quota",
        ),
        (
            {"pods": 2},
            {"pods": 0},
            "pods needs 3 (1 for the head, 2 x 1 for worker pods), and 2 is allowed; lower workers.min, put more workers into a "
            "pod by --workers-per-pod, or raise the quota",
        ),
        (
            {"requests.nvidia.com/gpu": "1"},
            None,
            "gpu needs 2 (2 x 1 for worker pods), and 1 is allowed; lower workers.min or workers.num_gpus, or raise the quota",
        ),
        ({"cpu": "0"}, None, "and 0 is allowed"),
        ({"pods": "8"}, {"pods": "11"}, "8 is allowed, of which 11 is used"),  # the quota was lowered later
    ],
)
def test_refusal_names_quota_resource_need_allowance_and_remedy(
    hard: dict[str, Any], used: dict[str, Any] | None, told: str, written: Any
) -> None:
    with pytest.raises(ConfigError) as refused:
        check(config(num_gpus=1.0), deployment(), written(quota(hard=hard, used=used)))
    assert told in str(refused.value)


def test_what_is_used_counts(written: Any) -> None:
    hard = {"pods": "9"}
    assert check(config(), deployment(), written(quota(hard=hard, used={"pods": "0"}))) == []
    (note,) = check(config(), deployment(), written(quota(hard=hard, used={"pods": "4"})))
    assert "9 is allowed, of which 4 is used; at most 4 of 8 worker pods" in note
    with pytest.raises(ConfigError, match="7 is used"):
        check(config(), deployment(), written(quota(hard=hard, used={"pods": "7"})))


def test_resource_that_is_not_asked_for_is_no_obstacle(written: Any) -> None:
    """Nor is one of which a quota was lowered below what is used."""
    hard = {"requests.nvidia.com/gpu": "0", "persistentvolumeclaims": "0", "count/jobs.batch": "0", "services": "5"}
    assert check(config(), deployment(), written(quota(hard=hard, used={"requests.nvidia.com/gpu": "4"}))) == []
    assert check(config(), deployment(), written(quota())) == []


def test_minimum_that_is_kept_on_purpose_is_told_by_its_option(written: Any) -> None:
    with pytest.raises(ConfigError, match="pods needs 7 .* lower --min-pods,"):
        check(config(), deployment(min_pods=6), written(quota(hard={"pods": "4"})))


def test_every_quota_and_resource_is_told_at_once(written: Any) -> None:
    file = written(
        quota("a", hard={"pods": "1", "cpu": "1", "memory": "1Ti"}), quota("b", hard={"limits.memory": "1Gi"})
    )
    with pytest.raises(ConfigError) as refused:
        check(config(), deployment(), file)
    assert [line.split(" has")[0] for line in str(refused.value).splitlines()] == ["quota a", "quota a", "quota b"]


# -- which pods a quota is for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "compared"),
    [
        ({"scopes": ["NotTerminating"]}, True),
        ({"scopes": ["NotBestEffort", "NotTerminating"]}, True),
        ({"scopes": ["Terminating"]}, False),
        ({"scopes": ["BestEffort"]}, False),
        ({"scopes": ["NotTerminating", "PriorityClass"]}, False),
        ({"scopeSelector": {"matchExpressions": [{"scopeName": "NotTerminating", "operator": "Exists"}]}}, True),
        ({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["a"]}]}}, False),
        ({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "DoesNotExist"}]}}, True),
        ({"scopeSelector": {"matchExpressions": [{"scopeName": "CrossNamespacePodAffinity", "operator": "Exists"}]}}, False),
    ],
)  # fmt: skip
def test_quota_for_other_pods_is_told_and_not_compared(spec: dict[str, Any], compared: bool, written: Any) -> None:
    file = written(quota(hard={"pods": "1"}, **spec))
    if compared:
        with pytest.raises(ConfigError, match="quota compute has no room"):
            check(config(), deployment(), file)
    else:
        (note,) = check(config(), deployment(), file)
        assert "quota compute is for other pods" in note
        assert "it was not compared" in note


def test_quotas_of_other_namespaces_are_left_out(written: Any) -> None:
    ours, theirs = quota("ours", hard={"pods": "12"}), quota("theirs", hard={"pods": "1"})
    ours["metadata"]["namespace"], theirs["metadata"]["namespace"] = "team", "others"
    file = written(ours, theirs)
    assert check(config(), deployment(namespace="team"), file) == []
    with pytest.raises(ConfigError, match="quota theirs has no room"):
        check(config(), deployment(namespace="others"), file)
    with pytest.raises(ConfigError, match=r"holds quotas of others, team; say by --namespace which one is meant"):
        check(config(), deployment(), file)
    with pytest.raises(
        ConfigError, match=r"--namespace is nobody; write them with `kubectl get resourcequota -n nobody"
    ):
        check(config(), deployment(namespace="nobody"), file)
    assert check(config(), deployment(), written(ours)) == []


# -- what is read ----------------------------------------------------------------------------------------------------


def test_quotas_are_read_as_kubectl_prints_them(written: Any) -> None:
    assert [problems(item) for item in yaml.safe_load(LISTED)["items"]] == [[], []]
    compute, objects = load(written(LISTED))
    assert (compute.name, compute.namespace, objects.hard) == ("compute", "team", {"pods": "12"})
    assert [compute.left(name) for name in compute.hard] == [Fraction(23, 2), 12, 76 * 2**30]
    assert check(config(), deployment(), written(LISTED)) == []


def test_quotas_are_read_from_a_stream_of_objects(written: Any) -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}}
    listed = {"apiVersion": "v1", "kind": "ResourceQuotaList", "items": [quota("b"), quota("c")]}
    assert [found.name for found in load(written(namespace, quota("a"), None, listed))] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is not YAML"),
        ("a: 1\na: 2", "'a' is written twice"),
        ("", "holds no v1 ResourceQuota, but nothing; write one with `kubectl get resourcequota -o yaml`"),
        ("kind: List\napiVersion: v1\nitems: []", "but nothing"),
        ("kind: Pod\napiVersion: v1", "but v1 Pod"),
        ("kind: ResourceQuota\napiVersion: v2", "but v2 ResourceQuota"),
        (
            "kind: ClusterResourceQuota\napiVersion: quota.openshift.io/v1",
            "but quota.openshift.io/v1 ClusterResourceQuota",
        ),
        ("name: my-run", "an object without a kind"),
        ("- 1\n- 2", "something that is no object of Kubernetes"),
        ("just words", "something that is no object of Kubernetes"),
        ("kind: List\nitems: 3", "something that is no object of Kubernetes"),
        ("&a {kind: List, items: [*a]}", "but List"),  # in itself
        ("\x00", "is not YAML"),
        ("[" * 5000, "cannot be read"),
    ],
)
def test_file_that_holds_no_quota_is_refused_with_the_reason(text: str, told: str, written: Any) -> None:
    with pytest.raises(ConfigError, match=told):
        load(written(text))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metadata": {}}, "without metadata.name"),
        ({"metadata": {"name": "a", "namespace": 3}}, "a namespace that is no text"),
        ({"metadata": "a"}, "metadata is a str, and must be a mapping"),
        ({"spec": {"hard": ["pods"]}}, "quota compute: hard is a list, and must be a mapping"),
        ({"spec": {"hard": {"pods": "many"}}}, "spec.hard.pods: 'many' is no quantity of Kubernetes"),
        ({"spec": {"hard": {"services": None}}}, "spec.hard.services: a NoneType is no quantity"),
        ({"spec": {"hard": {"cpu": True}}}, "spec.hard.cpu: a bool is no quantity"),
        ({"spec": {"hard": {"requests.memory": "8GB"}}}, "spec.hard.requests.memory: '8GB' is no quantity"),
        ({"spec": {"hard": {"cpu": "-1"}}}, "spec.hard.cpu: -1 is below 0"),
        ({"spec": {"hard": {"pods": "1500m"}}}, "spec.hard.pods: 1500m is no whole number"),
        ({"spec": {"hard": {"requests.nvidia.com/gpu": 0.5}}}, "gpu: 0.5 is no whole number"),
        ({"status": {"used": {"cpu": "some"}}}, "status.used.cpu: 'some' is no quantity"),
        ({"spec": {"scopes": ["Often"]}}, "'Often' with 'Exists' is no scope of Kubernetes; scopes are NotTerminating"),
        ({"spec": {"scopes": "BestEffort"}}, "must be lists"),
        ({"spec": {"scopeSelector": {"matchExpressions": [3]}}}, "None with None is no scope"),
    ],
)
def test_quota_that_kubernetes_would_not_take_is_refused(change: dict[str, Any], told: str, written: Any) -> None:
    with pytest.raises(ConfigError, match=told):
        load(written({**quota(), **change}))


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the quotas .*absent.yaml: No such file"):
        load(str(tmp_path / "absent.yaml"))
    (tmp_path / "latin").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        load(str(tmp_path / "latin"))


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    workers = {"min": 2, "max": 8}
    return write_config(tmp_path, storage="s3://bucket/prefix", data={"tokens": "s3://bucket/tokens"}, workers=workers)


@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
def test_command_prints_nothing_when_the_minimum_has_no_room(kind: str, run_file: str, written: Any) -> None:
    file = written(quota("\x1b[31mred", hard={"pods": "2"}))
    result = run("deploy", run_file, "--kind", kind, "--quota", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "quota \\x1b[31mred has no room for the least that the run needs: pods needs 3" in result.stderr


def test_command_warns_beside_the_manifests_when_the_maximum_has_none(run_file: str, written: Any) -> None:
    result = run("deploy", run_file, "--quota", written(quota("\x1b[31mred", hard={"pods": "6"})))
    assert result.exit_code == 0
    assert result.stdout == run("deploy", run_file).stdout
    assert result.stderr.startswith("Warning: quota \\x1b[31mred has no room for all of the run's pods: pods needs 9")


def test_command_says_nothing_when_all_fits(run_file: str, written: Any) -> None:
    result = run("deploy", run_file, "--quota", written(LISTED), "--namespace", "team")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [document["kind"] for document in yaml.safe_load_all(result.stdout)][-1] == "RayJob"


def test_mistakes_of_the_deployment_come_before_its_quotas(run_file: str, written: Any) -> None:
    result = run("deploy", run_file, "--max-pods", "1", "--quota", written(quota(hard={"pods": "1"})))
    assert "workers.min=2 is more than ever fits" in result.stderr
    assert "quota" not in result.stderr
