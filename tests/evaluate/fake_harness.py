"""A package that calls itself lm_eval, small enough to be known by heart, and the Python that has it.

Its tasks ask how likely the texts b and c are behind a, and do what their names say: `dies`, `dies_in_a_line`, `fails`,
`forks_and_dies`, `forks_and_hangs`, `hangs`, `unsafe`, `unloadable`. `good` and `better` only ask; the group `both` has them
both. `sure` has figures that need no answer; `writes` asks for a text with the generation_kwargs in options.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.evaluate.harness.evaluation import Harness
from elastic_lm.evaluate.result import Result
from elastic_lm.storage import Storage

VERSION = "9.8.7"

PACKAGE = r'''
import json, os, signal, sys, time
from types import SimpleNamespace

ASKED = ["b", "c", "c?"]


class TemplateLM:
    def __init__(self):
        pass

    def loglikelihood(self, requests):
        pairs = []
        for request in requests:
            context, text = request.args
            before, whole = self.tok_encode(context), self.tok_encode(context + text)
            pairs.append((request.args, before, whole[len(before):]))
        return self._loglikelihood_tokens(pairs)


class Task:
    VERSION = 1.5

    def __init__(self, name):
        self.task_name = name
        self.UNSAFE_CODE = name == "unsafe"
        self.config = SimpleNamespace(generation_kwargs=None)


class Group:
    name, version, has_aggregation = "both", "2.0", True

    def get_all_tasks(self):
        return [Task("good"), Task("better")]

    def to_dict(self):
        return {"group": "both"}

    def aggregate(self, figures):
        values = [figures[task.task_name]["log_p,none"] for task in self.get_all_tasks()]
        return {"alias": "both", "log_p,none": sum(values) / 2, "log_p_stderr,none": "N/A", "sample_len": 6}


class TaskManager:
    def __init__(self, include_path=None):
        self.folder = include_path
        if include_path and os.path.exists(f"{include_path}/broken.yaml"):
            raise ValueError("broken.yaml is no task")
        self.all_tasks = ["good", "better", "both", "dies", "dies_in_a_line", "fails", "forks_and_dies", "forks_and_hangs"]
        self.all_tasks += ["hangs", "sure", "unsafe", "unloadable", "writes"]

    def load(self, names):
        (name,) = names
        with open(f"{self.folder}/pid", "w") as file:
            file.write(f"{os.getpid()}\n")
        if name == "unloadable":
            raise ConnectionError("no such data\nis anywhere")
        if name == "both":
            return {"tasks": {task.task_name: task for task in Group().get_all_tasks()}, "groups": {"both": Group()}}
        task = Task(name)
        if name == "writes":
            with open(f"{self.folder}/options.json") as file:
                task.config.generation_kwargs = json.load(file)
        return {"tasks": {name: task}}


def simple_evaluate(model, tasks, task_manager, num_fewshot, limit, log_samples, **seeds):
    (task,) = tasks
    if task.task_name == "dies":
        print("out of patience", flush=True)
        os._exit(3)
    if task.task_name == "dies_in_a_line":
        os.write(int(sys.argv[2]), b'{"ask": "score", "abo')
        os.kill(os.getpid(), signal.SIGKILL)
    if task.task_name.startswith("forks"):
        child = os.fork()
        if not child:
            time.sleep(600)
        with open(f"{task_manager.folder}/child", "w") as file:
            file.write(f"{child}\n")
        if task.task_name == "forks_and_dies":
            print("killed from without", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    if task.task_name == "fails":
        raise ZeroDivisionError("no item is left")
    if task.task_name == "hangs":
        time.sleep(600)
    texts = ASKED[:limit]
    found = model.loglikelihood([SimpleNamespace(args=("a", text)) for text in texts])
    long = model.loglikelihood_rolling([SimpleNamespace(args=("ab" * 5,))])
    written = model.generate_until([SimpleNamespace(args=("a", task.config.generation_kwargs or {"until": ["\n"]}))])
    mean = sum(log_p for log_p, _ in found) / len(found)
    figures = {
        "alias": "what people call it",
        "log_p,none": mean, "log_p_stderr,none": 0.5,
        "greedy,strict": sum(greedy for _, greedy in found), "greedy_stderr,strict": "N/A",
        "huge,none": 1e308, "huge_stderr,none": 1e308,
        "rolling,none": long[0], "written,none": len(written[0]), "parts,none": ("not", "a", "number"),
    }
    sample = {"doc_hash": "d", "prompt_hash": "p", "target_hash": "t"}
    rows = [sample] * len(texts)
    if task.task_name == "sure":
        figures = {
            "right,none": 1.0, "right_stderr,none": 0.0,
            "share,none": 0.98, "share_stderr,none": 0.02,
            "gain,none": 0.98, "gain_stderr,none": 0.02,
        }
        values = [{"right": 1.0, "share": 0.96, "gain": 1.0}, {"right": 1.0, "share": 1.0, "gain": 0.5}]
        rows = [{**sample, **each, "filter": "none"} for each in [*values, {"right": 1.0, "share": 0.98, "gain": 1.44}]]
    config = {
        "task": task.task_name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": f"{task_manager.folder}/items.jsonl"},
        "process_docs": f"functools.partial(<function f at {hex(id(task))}>)",
        "num_fewshot": num_fewshot,
    }
    name = task.task_name
    return {
        "results": {name: figures}, "configs": {name: config}, "samples": {name: rows},
        "versions": {name: Task.VERSION}, "n-shot": {name: num_fewshot or 0},
        "n-samples": {name: {"original": len(ASKED), "effective": len(texts)}},
    }


def normalize_gen_kwargs(kwargs, most):
    return {"do_sample": bool(kwargs.get("temperature")), "max_gen_toks": 4, "until": [], **kwargs}


def get_rolling_token_windows(tokens, prefix_token, max_seq_len, context_len):
    """Each token behind the one before it."""
    return zip([[before] for before in [prefix_token, *tokens]], [[token] for token in tokens])


def make_disjoint_window(window):
    return window
'''


def install(folder: Path, *, at_import: str = "") -> str:
    """Write the package into `folder`.    Returns: a program that is a Python which has it, and nothing else."""
    for module in ("", "api", "api/model", "evaluator", "models", "models/utils", "tasks", "utils"):
        path = folder / "lm_eval" / module / "__init__.py"
        path.parent.mkdir(parents=True)
        path.write_text("from lm_eval import *\n" if module else f"{at_import}\n{PACKAGE}")
    info = folder / f"lm_eval-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lm_eval\nVersion: {VERSION}\n")
    return program(folder / "python", f'PYTHONPATH={folder} exec {sys.executable} -S "$@"')


def program(path: Path, line: str) -> str:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def asked(config: RunConfig, *names: str, step: int | None = None, **choices: Any) -> list[Result]:
    """What tasks of these names come to for the run's model."""
    return list(Harness(names, **choices).evaluate(Storage.open(config.run_url), config, step))
