"""`deploy`: a run as manifests of a cluster, on stdout. What is in them is decided in deploy/; nothing is started or asked."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elastic_lm import __version__, cli_run
from elastic_lm.errors import ConfigError
from elastic_lm.terminal import deliver, say, told_errors, visible

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig
    from elastic_lm.deploy.choices import Deployment

app = typer.Typer()
Kind = Literal["rayjob", "raycluster"]


@app.command()
def deploy(
    config: cli_run.RunFile,
    set_: cli_run.Overrides = None,
    target: Annotated[Literal["kuberay"], typer.Option(help="What runs the cluster.")] = "kuberay",
    kind: Annotated[Kind, typer.Option(help="A cluster for this run, or one that stays.")] = "rayjob",
    name: Annotated[str | None, typer.Option(help="Of the RayJob; else the run's, as a DNS label.")] = None,
    image: Annotated[str | None, typer.Option(help="What pods run; else elastic-lm:VERSION-cpu or -gpu.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Else the one that kubectl uses.")] = None,
    s3_secret: Annotated[
        str | None, typer.Option(help="Secret with the storage client's variables.", metavar="NAME")
    ] = None,
    s3_port: Annotated[int, typer.Option(help="Port of the object store.", min=1, max=65_535)] = 443,
    service_account: Annotated[str | None, typer.Option(help="Of all pods, for a role in a cloud.")] = None,
    token_auth: Annotated[bool, typer.Option("--token-auth", help="Ray asks its clients for a token.")] = False,
    auth_secret: Annotated[
        str | None, typer.Option(help="Secret with the token as auth_token; else KubeRay makes one.", metavar="NAME")
    ] = None,
    workers_per_pod: Annotated[int, typer.Option(help="Of the run's workers.", min=1, max=1024)] = 1,
    worker_cpus: Annotated[int | None, typer.Option(help="Of a worker pod; else what its workers hold.", min=1)] = None,
    worker_memory: Annotated[str, typer.Option(help="Of a worker pod.")] = "8Gi",
    head_cpus: Annotated[int, typer.Option(help="Of the head's pod.", min=1)] = 2,
    head_memory: Annotated[str, typer.Option(help="Of the head's pod.")] = "8Gi",
    spot_label: Annotated[
        list[str] | None, typer.Option(help="What marks a spot node; adds a group for them.", metavar="K=V")
    ] = None,
    spot_taint: Annotated[
        list[str] | None, typer.Option(help="A taint of spot nodes; K alone for any value.", metavar="K=V")
    ] = None,
    spot_max_pods: Annotated[int | None, typer.Option(help="At most so many on spot nodes.", min=0)] = None,
    max_pods: Annotated[int | None, typer.Option(help="At most so many on other nodes.", min=0)] = None,
    min_pods: Annotated[
        int | None, typer.Option(help="There at all times, on other nodes; else for workers.min.", min=0)
    ] = None,
    drain_s: Annotated[int, typer.Option(help="Seconds that a pod has to leave.", min=5, max=3600)] = 60,
    retries: Annotated[int, typer.Option(help="New clusters for a RayJob that failed.", min=0, max=100)] = 3,
    monitoring_namespace: Annotated[str, typer.Option(help="Which may scrape.")] = "monitoring",
    operator_namespace: Annotated[str, typer.Option(help="Of KubeRay's operator.")] = "kuberay-system",
    quota: Annotated[
        str | None,
        typer.Option(help="ResourceQuotas of the namespace; no room, no manifests.", metavar="FILE"),
    ] = None,
) -> None:
    """Print the manifests that run a run on KubeRay.

    A config, a NetworkPolicy and a RayJob, or with --kind raycluster a RayCluster: elastic-lm deploy RUN.YAML > rayjob.yaml,
    then kubectl apply -f rayjob.yaml. The run's tokens and storage must be s3:// addresses. A run of that name that is there
    goes on.
    """
    with told_errors():
        from elastic_lm.config import RunConfig
        from elastic_lm.deploy import choices, kuberay, quotas

        run = RunConfig.load(config, set_ or ())
        deployment = choices.Deployment(
            name=choices.label_of(run.name) if name is None else name,
            image=_image(run) if image is None else image,
            namespace=namespace,
            s3_secret=s3_secret,
            s3_port=s3_port,
            service_account=service_account,
            token_auth=token_auth,
            auth_secret=auth_secret,
            workers_per_pod=workers_per_pod,
            worker_cpus=worker_cpus,
            worker_memory=worker_memory,
            head_cpus=head_cpus,
            head_memory=head_memory,
            spot_labels=tuple(_pair("--spot-label", text) for text in spot_label or ()),
            spot_taints=tuple(_pair("--spot-taint", text, value_needed=False) for text in spot_taint or ()),
            spot_max_pods=spot_max_pods,
            max_pods=max_pods,
            min_pods=min_pods,
            drain_s=drain_s,
            retries=retries,
            monitoring_namespace=monitoring_namespace,
            operator_namespace=operator_namespace,
        )
        text = kuberay.as_text(kuberay.documents(run, deployment, kind), _comment(run, deployment, kind))
        for note in [] if quota is None else quotas.check(run, deployment, quota):
            say(visible(f"Warning: {note}."), sys.stderr)
    deliver(text, end="")


def _image(run: RunConfig) -> str:
    return f"elastic-lm:{__version__}-{'gpu' if run.workers.num_gpus else 'cpu'}"


def _pair(option: str, text: str, *, value_needed: bool = True) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not key or (value_needed and not value):
        raise ConfigError(f"{option} {text!r} is not KEY=VALUE; write e.g. {option} karpenter.sh/capacity-type=spot")
    return key, value


def _comment(run: RunConfig, deployment: Deployment, kind: Kind) -> str:
    """What to do with it, before the objects."""
    space = f" -n {deployment.namespace}" if deployment.namespace else ""
    low, high = run.workers.min, run.workers.max
    size = f"{low} to {high} workers" if low < high else f"{high} worker{'s' * (high > 1)}"
    paragraphs = [
        f"Run {run.name} with {size} on KubeRay, by `elastic-lm deploy` {__version__}.",
        f"kubectl apply{space} -f THIS_FILE",
        f"It needs KubeRay's operator 1.7 or later, the image {deployment.image} where nodes can pull it (cluster/image), and "
        f"{_access(deployment)}.",
    ]
    if own := [path for path in (run.model.factory, run.objective.name) if path is not None and ":" in path]:
        paragraphs.append(f"Install the code of {' and '.join(own)} in that image: pods see nothing of this folder.")
    if kind == "rayjob":
        paragraphs.append(
            "The run resumes by its name: after a lost head and after a failure by itself, after a stop when the RayJob is "
            "deleted and applied again."
        )
    else:
        paragraphs += [
            "It waits for runs. To submit this one:",
            f"kubectl exec{space} -it POD_OF_THE_HEAD -c ray-head -- ray job submit --no-wait --address http://127.0.0.1:8265 "
            f"""--runtime-env-json '{{"env_vars": {{"RAY_JOB_STOP_WAIT_TIME_S": "{deployment.drain_s}"}}}}' """
            "-- elastic-lm train /etc/elastic-lm/run.yaml --set metrics.host=0.0.0.0",
        ]
    return "\n".join(text if text.startswith("kubectl") else textwrap.fill(text, 110) for text in paragraphs)


def _access(deployment: Deployment) -> str:
    if deployment.s3_secret:
        return f"the Secret {deployment.s3_secret} with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the like"
    return "a role that gives its pods access to storage, or --s3-secret"
