"""`deploy`: what can never run is refused in a sentence with a remedy, with exit code 2 and nothing on stdout."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from elastic_lm import __version__
from tests.cluster.schemas import cluster_spec, problems
from tests.test_cli import SECRET, run, write_config

WORKERS = {"min": 2, "max": 8}


@pytest.fixture
def config(tmp_path: Path) -> str:
    return write_config(
        tmp_path, name="My.Run", storage="s3://bucket/prefix", data={"tokens": "s3://bucket/tokens"}, workers=WORKERS
    )


def test_manifests_are_all_of_stdout(config: str) -> None:
    result = run("deploy", config, "--target", "kuberay")
    assert (result.exit_code, result.stderr) == (0, "")
    objects = list(yaml.safe_load_all(result.stdout))
    assert [document["kind"] for document in objects] == ["ConfigMap", "NetworkPolicy", "RayJob"]
    assert [document["metadata"]["name"] for document in objects] == ["my-run-config", "my-run", "my-run"]
    assert [problem for document in objects for problem in problems(document)] == []


def test_comment_says_how_to_apply_it_and_what_it_needs(config: str) -> None:
    comment = " ".join(
        line.removeprefix("# ")
        for line in run("deploy", config, "--namespace", "team", "--s3-secret", "keys").stdout.splitlines()
        if line.startswith("#")
    )
    assert "kubectl apply -n team -f THIS_FILE" in comment
    assert f"the image elastic-lm:{__version__}-cpu" in comment
    assert "the Secret keys with AWS_ACCESS_KEY_ID" in comment


def test_comment_of_a_cluster_says_how_to_submit(config: str) -> None:
    result = run("deploy", config, "--kind", "raycluster", "--drain-s", "45")
    assert "ray job submit" in result.stdout
    assert '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "45"}}' in result.stdout
    assert list(yaml.safe_load_all(result.stdout))[-1]["kind"] == "RayCluster"


def test_own_code_must_be_in_the_image(config: str) -> None:
    result = run("deploy", config, "--set", "objective.name=my.module:loss")
    assert "# Install the code of my.module:loss in that image" in result.stdout


def test_options_reach_the_manifest(config: str) -> None:
    options = (
        "--name train --namespace team --image reg/elastic:1 --s3-secret keys --s3-port 9000 --service-account trainer "
        "--auth-secret token --workers-per-pod 2 --worker-cpus 6 --worker-memory 20Gi --head-cpus 3 --head-memory 5Gi "
        "--spot-label a/b=c --spot-taint t --spot-max-pods 2 --max-pods 3 --min-pods 2 --drain-s 20 --retries 1 "
        "--monitoring-namespace watch --operator-namespace ray"
    )
    result = run("deploy", config, *options.split())
    assert result.exit_code == 0, result.stderr
    objects = list(yaml.safe_load_all(result.stdout))
    policy, job = objects[1:]
    assert [problem for document in objects for problem in problems(document)] == []
    assert (job["metadata"]["name"], job["metadata"]["namespace"], job["spec"]["backoffLimit"]) == ("train", "team", 1)
    spot, other = cluster_spec(job)["workerGroupSpecs"]
    assert (spot["maxReplicas"], other["minReplicas"], other["maxReplicas"]) == (2, 2, 3)
    pod = other["template"]["spec"]
    assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("trainer", 30)
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "6", "memory": "20Gi"}
    head = cluster_spec(job)["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert (head["image"], head["resources"]["limits"]) == ("reg/elastic:1", {"cpu": "3", "memory": "5Gi"})
    assert cluster_spec(job)["authOptions"] == {"mode": "token", "secretName": "token"}
    assert "watch" in str(policy)
    assert "'ray'" in str(policy["spec"]["ingress"][1])
    assert 9000 in [port["port"] for port in policy["spec"]["egress"][2]["ports"]]


def test_overrides_are_part_of_the_run(config: str) -> None:
    result = run("deploy", config, "--set", "workers.max=4", "--set", "workers.num_gpus=1")
    objects = list(yaml.safe_load_all(result.stdout))
    assert yaml.safe_load(objects[0]["data"]["run.yaml"])["workers"] == {"min": 2, "max": 4, "num_gpus": 1.0}
    (group,) = cluster_spec(objects[-1])["workerGroupSpecs"]
    assert group["maxReplicas"] == 4
    assert group["template"]["spec"]["containers"][0]["image"].endswith("-gpu")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", f"name={'n' * 48}"], ["48 characters, and KubeRay allows 47", "--name", "keeps its name"]),
        (["--name", "n" * 48], [f"--name {'n' * 48}: 48 characters"]),
        (["--name", "My.Run"], ["--name 'My.Run' is no DNS label", "--name my-run"]),
        (["--name", "1a"], ["is no DNS label", "--name run-1a"]),
        (["--namespace", "Team"], ["--namespace 'Team' is no name of a namespace"]),
        (["--image", "a b"], ["--image 'a b' is no image"]),
        (
            ["--set", "storage=/data/runs"],
            ["storage=file:///data/runs", "no pod sees", "--set storage=s3://bucket/prefix"],
        ),
        (["--set", "data.tokens=tokens"], ["data.tokens=file://", "--set data.tokens=s3://bucket/tokens"]),
        (["--set", "model={init: hf:/model}"], ["model.init=hf:file:///model", "hf:s3://bucket/model"]),
        (
            ["--set", "metrics={tls_certificate: /tls.crt, tls_key: /tls.key}"],
            ["metrics.tls_certificate=/tls.crt", "--set metrics.tls_key=null"],
        ),
        (["--set", "checkpoint.fallback=/data"], ["goes with the pod", "--set checkpoint.fallback=null"]),
        (
            ["--set", "tracking={tensorboard: true, folder: /data}"],
            ["tracking.folder=/data", "--set tracking={}", "export RUN --to tensorboard"],
        ),
        (["--worker-memory", "8GB"], ["--worker-memory: '8GB' is no amount of memory", "8Gi"]),
        (["--head-memory", "1.5Gi"], ["--head-memory: '1.5Gi'"]),
        (["--worker-cpus", "2", "--set", "workers.num_cpus=4"], ["holds no 1 worker", "use at least 4"]),
        (["--workers-per-pod", "3", "--worker-cpus", "2"], ["use at least 3"]),
        # what can never hold the smallest number of workers
        (
            ["--max-pods", "1"],
            ["workers.min=2 is more than ever fits", "1 workers pods", "--max-pods, or lower workers.min"],
        ),
        (
            ["--spot-label", "a=b", "--spot-max-pods", "1", "--max-pods", "0"],
            ["1 spot + 0 on-demand pods", "--spot-max-pods"],
        ),
        (["--set", "workers.min=8", "--workers-per-pod", "3", "--max-pods", "2"], ["hold 6", "allow 3 pods"]),
        (["--max-pods", "3", "--min-pods", "4"], ["--min-pods 4 is more than the 3 pods"]),
        (["--set", "workers.min=9"], ["workers.min=9 is more than workers.max=8"]),
        (["--spot-label", "spot"], ["--spot-label 'spot' is not KEY=VALUE"]),
        (["--spot-taint", "=x"], ["--spot-taint '=x' is not KEY=VALUE"]),
        (["--spot-taint", "spot"], ["--spot-taint is for nodes that --spot-label names"]),
        (["--spot-max-pods", "3"], ["--spot-max-pods is for nodes that --spot-label names"]),
        (["--s3-secret", f"AKIA/{SECRET}"], ["--s3-secret takes the name of an object", "kubectl create secret"]),
        (["--auth-secret", f"{SECRET}!"], ["--auth-secret takes the name"]),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_printed(
    options: list[str], told: list[str], config: str
) -> None:
    result = run("deploy", config, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    for words in told:
        assert words in result.stderr
    assert SECRET not in result.stderr


def test_all_mistakes_are_told_at_once(config: str) -> None:
    result = run(
        "deploy", config, "--set", "storage=runs", "--set", "data.tokens=tokens", "--max-pods", "1", "--name", "A"
    )
    assert len(result.stderr.splitlines()) == 4


@pytest.mark.parametrize(
    "options", [["--target", "slurm"], ["--kind", "rayservice"], ["--min-pods", "-1"], ["--drain-s", "1"]]
)
def test_unknown_choice_is_a_usage_error(options: list[str], config: str) -> None:
    result = run("deploy", config, *options)
    assert (result.exit_code, result.stdout) == (2, "")
