"""Where Prometheus finds a run and the nodes that it runs on: the scrape config of a machine, and PodMonitors for KubeRay.

Both give the run's endpoint the job `elastic-lm` and Ray's the job `ray`, so that dashboards need not know where they are.
"""

from __future__ import annotations

import sys
from typing import Any

from elastic_lm.monitor.rules import yaml_text

JOB = "elastic-lm"
RAY_JOB = "ray"
PORT = 9464  # that of `metrics.port` where nothing else is configured
PORT_NAME = "elastic-lm"  # of the head pod's container
RAY_PORT_NAME = "metrics"  # so KubeRay calls the port of every pod
# Written by Ray on the head node, with the addresses of all nodes; Prometheus reads it again when it changes.
RAY_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"
INTERVAL = "15s"
SAMPLE_LIMIT = 500  # a run has about 100 series, whatever the number of its workers, and 208 of tasks at the most


def prometheus_config() -> dict[str, Any]:
    """For a Prometheus on the head node."""
    return {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {
                "job_name": JOB,
                "sample_limit": SAMPLE_LIMIT,
                "static_configs": [{"targets": [f"127.0.0.1:{PORT}"]}],
            },
            {"job_name": RAY_JOB, "file_sd_configs": [{"files": [RAY_TARGETS]}]},
        ],
    }


def pod_monitors() -> tuple[dict[str, Any], dict[str, Any]]:
    """For the Prometheus operator: the run's endpoint on the head pod, and Ray's on every pod."""
    return (
        _pod_monitor(JOB, {"ray.io/node-type": "head"}, PORT_NAME, {"sampleLimit": SAMPLE_LIMIT}),
        _pod_monitor(RAY_JOB, {"ray.io/is-ray-node": "yes"}, RAY_PORT_NAME, {}),
    )


def _pod_monitor(job: str, pods: dict[str, str], port: str, limits: dict[str, int]) -> dict[str, Any]:
    named = {"targetLabel": "job", "replacement": job}  # the operator would make it namespace/name
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": job, "labels": {"app.kubernetes.io/name": JOB}},
        "spec": {
            "selector": {"matchLabels": pods},
            **limits,
            "podMetricsEndpoints": [{"port": port, "interval": INTERVAL, "relabelings": [named]}],
        },
    }


DOCUMENTS = {
    "prometheus": lambda: yaml_text(
        prometheus_config(), about="Scrapes a run and Ray's nodes, for a Prometheus on the head node."
    ),
    "podmonitor": lambda: yaml_text(
        *pod_monitors(), about="Scrapes a run and Ray's pods, for the Prometheus operator on Kubernetes."
    ),
}

if __name__ == "__main__":
    print(DOCUMENTS[sys.argv[1]](), end="")
