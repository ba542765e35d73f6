"""A folder is an import permission: what each part may import, read from the source of every module.

`ALLOWED` is the table of DESIGN.md's layout. A module that no row covers fails: a new part states what it stands on. All
imports count, those inside functions and those for the type checker too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Besides the standard library and its own folder. A name covers what is below it.
ALLOWED = {
    "elastic_lm.errors": set(),
    "elastic_lm.protocol": set(),
    "elastic_lm.result": set(),
    "elastic_lm.gpus": set(),
    "elastic_lm.job_version": {"elastic_lm.__version__", "elastic_lm.errors"},
    "elastic_lm.failpoints": {"elastic_lm.errors"},
    "elastic_lm.storage": {"elastic_lm.errors", "s3fs", "fsspec", "botocore"},
    "elastic_lm.process_identity": set(),
    "elastic_lm.ownership": {"elastic_lm.errors", "elastic_lm.storage", "elastic_lm.process_identity"},
    "elastic_lm.model": {"torch", "elastic_lm.errors"},
    "elastic_lm.engine": {
        "torch", "elastic_lm.model", "elastic_lm.errors", "elastic_lm.protocol", "elastic_lm.failpoints", "elastic_lm.gpus",
    },
    "elastic_lm.data": {"numpy", "pyarrow", "tokenizers", "xxhash", "elastic_lm.errors", "elastic_lm.storage"},
    "elastic_lm.events": {"elastic_lm.errors", "elastic_lm.storage"},
    "elastic_lm.control": {"elastic_lm.protocol", "elastic_lm.events.types"},
    "elastic_lm.checkpoint": {
        "torch", "safetensors", "elastic_lm.errors", "elastic_lm.storage", "elastic_lm.failpoints",
    },
    "elastic_lm.monitor": {
        "prometheus_client", "grafana_foundation_sdk", "IPython", "pyarrow", "rich", "yaml", "elastic_lm.__version__",
        "elastic_lm.data.progress", "elastic_lm.errors", "elastic_lm.evaluate.progress",
        "elastic_lm.evaluation_file", "elastic_lm.events", "elastic_lm.model.flops", "elastic_lm.storage",
    },
    "elastic_lm.huggingface": {
        "torch", "safetensors", "elastic_lm.checkpoint", "elastic_lm.config", "elastic_lm.data", "elastic_lm.errors",
        "elastic_lm.experiment.weights", "elastic_lm.model", "elastic_lm.storage",
    },
    "elastic_lm.trained_model": {
        "torch", "elastic_lm.config", "elastic_lm.data", "elastic_lm.engine", "elastic_lm.errors",
        "elastic_lm.experiment.weights", "elastic_lm.model", "elastic_lm.storage",
    },
    "elastic_lm.sample_loss": {
        "torch", "elastic_lm.config", "elastic_lm.data", "elastic_lm.engine", "elastic_lm.errors",
        "elastic_lm.experiment.standing", "elastic_lm.storage", "elastic_lm.trained_model",
    },
    "elastic_lm.generation": {"torch", "elastic_lm.engine.spec", "elastic_lm.errors", "elastic_lm.trained_model"},
    "elastic_lm.tracking": {
        "tensorboardX", "wandb", "elastic_lm.config", "elastic_lm.errors", "elastic_lm.events", "elastic_lm.monitor.held_out",
        "elastic_lm.monitor.table",
    },
    "elastic_lm.config": {
        "pydantic", "elastic_lm.config_rules", "elastic_lm.config_text", "elastic_lm.errors", "elastic_lm.control.spec",
        "elastic_lm.engine.spec", "elastic_lm.model.presets", "elastic_lm.model.spec",
    },
    "elastic_lm.config_rules": {
        "elastic_lm.config", "elastic_lm.config_text", "elastic_lm.engine.spec", "elastic_lm.errors",
        "elastic_lm.failpoints", "elastic_lm.model.presets", "elastic_lm.model.spec",
    },
    "elastic_lm.config_text": {"pydantic", "pydantic_core", "yaml", "elastic_lm.errors"},
    "elastic_lm.config_schema": {"elastic_lm.config", "elastic_lm.config_text"},
    "elastic_lm.config_template": {
        "pydantic", "elastic_lm.config", "elastic_lm.config_text", "elastic_lm.errors", "elastic_lm.model.presets",
    },
    "elastic_lm.estimate": {"elastic_lm.config", "elastic_lm.model.flops", "elastic_lm.model.spec"},
    "elastic_lm.privacy": set(),
    "elastic_lm.machine": set(),
    "elastic_lm.storage_probe": {"elastic_lm.errors", "elastic_lm.storage"},
    "elastic_lm.doctor": {
        "psutil", "elastic_lm.__version__", "elastic_lm.config", "elastic_lm.data", "elastic_lm.errors",
        "elastic_lm.machine", "elastic_lm.privacy", "elastic_lm.storage", "elastic_lm.storage_probe",
        "elastic_lm.terminal",
    },
    "elastic_lm.runtime": {"ray", "psutil", "numpy", "aiohttp", "requests", "elastic_lm"},
    "elastic_lm.evaluation_file": {"elastic_lm.errors", "elastic_lm.storage"},
    "elastic_lm.evaluate": {
        "torch", "numpy", "sacrebleu", "elastic_lm.config", "elastic_lm.config_text",
        "elastic_lm.data", "elastic_lm.engine", "elastic_lm.errors", "elastic_lm.evaluation_file",
        "elastic_lm.experiment.lineage", "elastic_lm.experiment.rewinds", "elastic_lm.experiment.standing",
        "elastic_lm.generation", "elastic_lm.model", "elastic_lm.protocol", "elastic_lm.storage", "elastic_lm.trained_model",
    },
    "elastic_lm.evaluate.harness.driver": {"lm_eval"},  # another Python runs it, which has no elastic-lm
    "elastic_lm.experiment": {
        "torch", "pydantic", "elastic_lm.__version__", "elastic_lm.checkpoint", "elastic_lm.config", "elastic_lm.config_text",
        "elastic_lm.data", "elastic_lm.engine", "elastic_lm.errors", "elastic_lm.evaluation_file", "elastic_lm.events",
        "elastic_lm.model", "elastic_lm.monitor", "elastic_lm.ownership", "elastic_lm.protocol", "elastic_lm.result",
        "elastic_lm.run_address", "elastic_lm.storage",
    },
    "elastic_lm.deploy": {"yaml", "elastic_lm.config", "elastic_lm.config_text", "elastic_lm.errors"},
    "elastic_lm.run_address": {
        "elastic_lm.config", "elastic_lm.config_text", "elastic_lm.errors", "elastic_lm.events", "elastic_lm.storage",
    },
    "elastic_lm.run": {
        "pyarrow", "elastic_lm.config", "elastic_lm.errors", "elastic_lm.evaluate", "elastic_lm.events",
        "elastic_lm.experiment.ancestry", "elastic_lm.experiment.fork", "elastic_lm.experiment.rewinds",
        "elastic_lm.experiment.standing", "elastic_lm.generation",
        "elastic_lm.huggingface", "elastic_lm.monitor", "elastic_lm.result",
        "elastic_lm.run_address", "elastic_lm.runtime.evaluators", "elastic_lm.runtime.remote", "elastic_lm.storage",
        "elastic_lm.tracking", "elastic_lm.trained_model",
    },
    "elastic_lm.experiments": {
        "elastic_lm.config", "elastic_lm.data.manifest", "elastic_lm.errors",
        "elastic_lm.evaluate", "elastic_lm.experiment", "elastic_lm.huggingface", "elastic_lm.result", "elastic_lm.run",
        "elastic_lm.run_address", "elastic_lm.runtime.plan", "elastic_lm.runtime.trainer", "elastic_lm.storage",
        "elastic_lm.tracking.trackers", "elastic_lm.trained_model",
    },
    "elastic_lm.terminal": {"typer", "elastic_lm.errors"},
    "elastic_lm.completion": set(),
    "elastic_lm.corpus_figures": {"elastic_lm.data", "elastic_lm.monitor.progress", "elastic_lm.storage", "elastic_lm.terminal"},
    "elastic_lm.cli_checkpoints": {"typer", "elastic_lm"},
    "elastic_lm.cli_config": {"typer", "elastic_lm"},
    "elastic_lm.cli_deploy": {"typer", "elastic_lm"},
    "elastic_lm.cli_doctor": {"typer", "elastic_lm"},
    "elastic_lm.cli_estimate": {"typer", "elastic_lm"},
    "elastic_lm.cli_evaluate": {"typer", "elastic_lm"},
    "elastic_lm.cli_reference": {"typer", "elastic_lm.cli", "elastic_lm.terminal"},
    "elastic_lm.cli_experiment": {"typer", "rich", "elastic_lm"},
    "elastic_lm.cli_fork": {"typer", "elastic_lm"},
    "elastic_lm.cli_jobs": {"typer", "elastic_lm"},
    "elastic_lm.cli_run": {"typer", "elastic_lm"},
    "elastic_lm.cli_runs": {"typer", "elastic_lm"},
    "elastic_lm.cli_data": {"typer", "rich", "elastic_lm"},
    "elastic_lm.cli": {"typer", "rich", "elastic_lm"},
    "elastic_lm.__main__": {"elastic_lm.cli"},
    "elastic_lm": {
        "elastic_lm.config", "elastic_lm.events.types", "elastic_lm.experiment.result", "elastic_lm.experiments",
        "elastic_lm.result", "elastic_lm.run", "elastic_lm.runtime.trainer",
    },
}  # fmt: skip

# `(state, event, now) -> (state, actions)`: no clock, no chance, no input or output.
FORBIDDEN_IN_CONTROL = {
    "asyncio", "datetime", "io", "logging", "os", "pathlib", "queue", "random", "secrets", "select", "signal", "socket",
    "subprocess", "tempfile", "threading", "time", "uuid",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "elastic_lm").rglob("*.py"))}


def imports(source: str) -> Iterator[str]:
    """Full names of what is imported; `from elastic_lm import storage` is elastic_lm.storage."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which part they lead to"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if node.module == "elastic_lm" or below in MODULES else str(node.module)


def part_of(module: str) -> str:
    """The row of the table that covers a module."""
    return module if module in ALLOWED else ".".join(module.split(".")[:2])


def covers(name: str, imported: str) -> bool:
    return imported == name or imported.startswith(f"{name}.")


def may_import(module: str, imported: str) -> bool:
    if imported.partition(".")[0] in sys.stdlib_module_names:
        return module.partition(".control")[1] == "" or imported.partition(".")[0] not in FORBIDDEN_IN_CONTROL
    part = part_of(module)
    in_own_folder = part != "elastic_lm" and covers(part, imported)
    return in_own_folder or any(covers(name, imported) for name in ALLOWED[part])


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_part_may(module: str) -> None:
    assert part_of(module) in ALLOWED, "say in ALLOWED what this part stands on"
    refused = [name for name in imports(MODULES[module].read_text()) if not may_import(module, name)]
    assert not refused


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("elastic_lm.engine.step", "ray"),
        ("elastic_lm.engine.step", "pydantic"),
        ("elastic_lm.engine.step", "elastic_lm.config"),
        ("elastic_lm.data.order", "torch"),
        ("elastic_lm.control.leases", "time"),
        ("elastic_lm.control.leases", "elastic_lm.events.log"),  # the types only: the log does I/O
        ("elastic_lm.monitor.goodput", "elastic_lm.runtime.ledger"),
        ("elastic_lm.checkpoint.store", "ray.util"),
        ("elastic_lm.config", "torch"),
        ("elastic_lm", "elastic_lm.storage"),
    ],
)
def test_table_refuses_what_the_design_refuses(module: str, imported: str) -> None:
    assert not may_import(module, imported)


def test_ray_is_imported_by_the_runtime_alone() -> None:
    found = {part_of(m) for m, path in MODULES.items() for name in imports(path.read_text()) if covers("ray", name)}
    assert found == {"elastic_lm.runtime"}


def loaded_after(statement: str, *names: str) -> list[str]:
    """Which of `names` a new interpreter has imported once it has run `statement`."""
    script = f"import sys\n{statement}\nprint([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


HELP = """
from elastic_lm.cli import app
try:
    app(['--help'])
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("import elastic_lm", ("ray", "torch", "pydantic", "numpy", "typer")),
        (HELP, ("ray", "torch", "pydantic", "numpy")),
        ("from elastic_lm import RunConfig", ("ray", "torch", "numpy")),
        ("from elastic_lm import Run, RunStatus", ("ray", "torch", "numpy", "pyarrow")),
        ("from elastic_lm import Experiment, ExperimentResult", ("ray", "torch", "pyarrow")),
        ("import elastic_lm.config_template, elastic_lm.config_schema, elastic_lm.estimate", ("ray", "torch", "numpy")),
        ("import elastic_lm.deploy.kuberay, elastic_lm.cli_deploy", ("ray", "torch", "numpy")),
        ("import elastic_lm.control.controller, elastic_lm.monitor.exporter", ("ray", "torch", "pydantic", "s3fs")),
        ("import elastic_lm.tracking.trackers", ("ray", "torch", "tensorboardX", "wandb", "pyarrow")),
        ("import elastic_lm.data.prepare, elastic_lm.events.log", ("ray", "torch", "pydantic", "s3fs")),
        # A worker shows a sign of life before it imports torch, and a reader never does.
        ("import elastic_lm.runtime.reader, elastic_lm.runtime.worker", ("torch",)),
    ],
    ids=[
        "the package",
        "--help",
        "a config",
        "a run",
        "an experiment",
        "what is made of configs",
        "manifests",
        "control and monitor",
        "trackers",
        "data and events",
        "a worker's start",
    ],
)
def test_import_is_as_light_as_it_says(statement: str, names: tuple[str, ...]) -> None:
    assert loaded_after(statement, *names) == []


def test_names_of_the_package_arrive_on_first_use() -> None:
    statement = "import elastic_lm\nassert dir(elastic_lm) == sorted(elastic_lm.__all__) and elastic_lm.RunResult"
    assert loaded_after(statement, "elastic_lm.result", "ray") == ["elastic_lm.result"]
    import elastic_lm

    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = elastic_lm.fitt


# What unpickles, or runs what it reads in another way. A name covers what is below it.
UNPICKLING = {
    "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "pickle5", "shelve",
    "multiprocessing.connection", "multiprocessing.managers", "ray.cloudpickle", "torch.multiprocessing",
    "torch.load", "torch.save", "torch.serialization", "torch.hub", "torch.jit", "torch.package",
    "torch.distributed.checkpoint", "torch.utils.model_zoo",
    "numpy.load", "numpy.save", "numpy.savez", "numpy.savez_compressed", "numpy.lib.format", "numpy.lib.npyio",
    "pandas.read_pickle", "yaml.CLoader", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader",
    "yaml.UnsafeLoader", "yaml.FullLoader",
}  # fmt: skip
# Whatever they are called on, and with whatever arguments.
UNPICKLING_ATTRIBUTES = {"read_pickle", "to_pickle", "unsafe_load", "full_load"}
UNPICKLING_ARGUMENTS = {"allow_pickle", "weights_only"}


def names_used(tree: ast.AST) -> Iterator[str]:
    """Every name in full: `t.load` after `import torch as t` is torch.load, and so is `load` after `from torch import load`."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
            parts.append(ast.unparse(node.args[1]).strip("'"))
            node = node.args[0]
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in known:
            yield ".".join([known[node.id], *reversed(parts)])


def unpicklers(source: str) -> set[str]:
    """What in this source could run code that it reads."""
    tree = ast.parse(source)
    found = {name for name in names_used(tree) if any(covers(banned, name) for banned in UNPICKLING)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in UNPICKLING_ATTRIBUTES:
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg in UNPICKLING_ARGUMENTS:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and node.value in UNPICKLING:  # for importlib, __import__ or getattr
            found.add(node.value)
    return found


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_nothing_that_is_read_is_unpickled(path: Path) -> None:
    """No file of ours, and no file of others', can run code: neither by pickle nor by what PyTorch and NumPy do with it."""
    assert unpicklers(path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import ray.cloudpickle as harmless",
        "from ray import cloudpickle",
        "import importlib\nimportlib.import_module('dill')",
        "__import__('joblib')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load as read",
        "from torch import serialization",
        "import torch\nread = torch.serialization.load",
        "import torch.distributed.checkpoint",
        "from torch.distributed import checkpoint",
        "import torch\ntorch.save({}, 'x')",
        "import torch\ngetattr(torch, 'load')('x')",
        "import shelve",
        "import numpy as np\nnp.load('x')",
        "from numpy import load",
        "import numpy\nnumpy.lib.format.read_array(file)",
        "def f(read):\n    return read('x', allow_pickle=True)",
        "def f(read):\n    return read('x', weights_only=False)",
        "import pandas as pd\npd.read_pickle('x')",
        "def f(frame):\n    frame.to_pickle('x')",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from multiprocessing.connection import Client",
    ],
)
def test_every_way_to_unpickle_is_found(source: str) -> None:
    assert unpicklers(source)


def test_what_only_looks_like_it_is_left_alone() -> None:
    assert (
        unpicklers("import json, torch\njson.load(file)\nmodel.load(torch.zeros(1))\n'a pickle'\nstore.save()") == set()
    )
