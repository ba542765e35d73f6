"""Who may talk to a deployment's pods, and whom they may talk to.

Ray runs whatever it is sent, so reaching 6379, 8265 or 10001 is as good as a shell in every pod. They are open to the pods
of the deployment itself, the dashboard to KubeRay's operator, metrics to the namespace that scrapes, and nothing to others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elastic_lm.deploy import pods
from elastic_lm.deploy.choices import Deployment

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig

API_SERVER_PORTS = (
    443,
    6443,
)  # as the service has it, and as it is behind the service: some networks look at the latter


def network_policy(config: RunConfig, deployment: Deployment) -> dict[str, Any]:
    own = {"podSelector": {"matchLabels": pods.labels(deployment)}}
    operator = {
        **_namespace(deployment.operator_namespace),
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
    }
    scraped = [pods.RAY_METRICS_PORT, *([config.metrics.port] if config.metrics.port else [])]
    outside = sorted({*API_SERVER_PORTS, deployment.s3_port})
    namespace = {"namespace": deployment.namespace} if deployment.namespace else {}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": deployment.name, **namespace, "labels": pods.labels(deployment)},
        "spec": {
            "podSelector": {"matchLabels": pods.labels(deployment)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": [operator], "ports": _tcp(pods.DASHBOARD_PORT)},
                {"from": [_namespace(deployment.monitoring_namespace)], "ports": _tcp(*scraped)},
            ],
            "egress": [
                {"to": [own]},
                {"ports": [{"protocol": "UDP", "port": 53}, *_tcp(53)]},
                {"ports": _tcp(*outside)},  # object storage and the API server, wherever they are
            ],
        },
    }


def _namespace(name: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _tcp(*ports: int) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port} for port in ports]
