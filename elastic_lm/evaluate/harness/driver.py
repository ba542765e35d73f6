"""What the Python that has lm-evaluation-harness runs. A file that is executed, of no package: it imports nothing of elastic-lm.

    python driver.py READ_FD WRITE_FD

Lines of JSON come and go through two pipes. First comes what is asked: {"tasks", "include", "samples", "shots"}. Told are then
{"harness": version, "unknown": names} with {"known"} where some are, and {"loaded": {name: tasks}}. After {"max_tokens",
"end_of_text"} the tasks begin, each with {"begun": task}. {"ask", "about"} is a question about the model, answered by one line.
{"result"} is what a task or a group came to, {"failed"} why there is no more, {"done"} the end.

Invariant: every task begins from the same seeds, so its figures do not depend on which others are asked. How a text is split
into context and continuation, and how long texts are cut into windows, is the harness's own code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

SEED = 1234  # the harness's own default for most of its four
RESAMPLES = 1000  # for figures that have no formula for their error; the harness's 100,000 take minutes
MOST_NEW_TOKENS = 256  # where a task does not say; the harness's own default for models of transformers
PLACES = ("dataset_path", "dataset_kwargs")  # where a task's data is, which is no part of what it asks
SHOWN_CHARACTERS = 1000  # of an error
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# What a task may ask of a continuation, and what changes nothing at this value, or where nothing is drawn. All else makes another
# text.
ASKED = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "use_cache"})
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty"), 1),
    **dict.fromkeys(
        ("presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens"), 0
    ),
    **{"min_p": 0, "typical_p": 1},
}
OF_DRAWS = frozenset({"top_k", "top_p", "min_p", "typical_p"})


class Channel:
    """Lines of JSON, of this process alone. It ends at once when whoever asks is gone, with all that it started."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        for fd in (read_fd, write_fd):
            os.set_inheritable(fd, False)
        os.register_at_fork(after_in_child=lambda: _let_go(read_fd, write_fd))
        self._written = os.fdopen(write_fd, "w", encoding="ascii")
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(read_fd,), daemon=True).start()

    def _read(self, read_fd: int) -> None:
        with os.fdopen(read_fd, encoding="ascii") as lines:
            for line in lines:
                self._lines.put(line)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def take(self) -> Any:
        return json.loads(self._lines.get())

    def tell(self, message: dict[str, Any]) -> None:
        self._written.write(json.dumps(message) + "\n")
        self._written.flush()

    def ask(self, question: str, about: Any) -> Any:
        self.tell({"ask": question, "about": about})
        return self.take()


def _let_go(*fds: int) -> None:
    """In a process that was forked: who waits at the other end is to see that this one has ended, whoever lives on."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)


class AskedModel(TemplateLM):
    """A model that is on the other side of the channel. Every text begins behind the token that ends a document."""

    def __init__(self, channel: Channel, max_tokens: int, end_of_text: int) -> None:
        super().__init__()
        self._channel, self.max_length, self._end_of_text = channel, max_tokens, end_of_text

    @property
    def eot_token_id(self) -> int:
        return self._end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self._channel.ask("encode", string)
        return ids if add_special_tokens is False else [self._end_of_text, *ids]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Of (anything, context, continuation), in tokens."""
        return [(log_p, greedy) for log_p, greedy in self._channel.ask("score", [pair for _, *pair in requests])]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._channel.ask("score", [window for each in windows for window in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        pairs = get_rolling_token_windows(tokens, self._end_of_text, max_seq_len=self.max_length, context_len=1)
        return map(make_disjoint_window, pairs)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        asked = [(prompt, _drawing(options)) for prompt, options in (request.args for request in requests)]
        texts: list[str] = self._channel.ask("generate", [{"prompt": prompt, **drawing} for prompt, drawing in asked])
        return texts


def _drawing(options: dict[str, Any]) -> dict[str, Any]:
    """How a text is drawn and where it ends, by a task's generation_kwargs.    Raises: ValueError when that cannot be done."""
    options = normalize_gen_kwargs(options, MOST_NEW_TOKENS)
    if options["do_sample"] and options.get("temperature") is None:
        raise ValueError("generation_kwargs has do_sample without a temperature; write which")
    is_drawn = bool(options.get("temperature"))
    options = {name: value for name, value in options.items() if is_drawn or name not in OF_DRAWS}
    for name, value in options.items():
        if name not in ASKED and value not in (None, NEUTRAL.get(name)):
            raise ValueError(f"generation_kwargs has {name}={value!r}, which is not done here")
    return {
        "stops": [stop for stop in options["until"] if stop],
        "max_new_tokens": options["max_gen_toks"],
        "temperature": options.get("temperature") or 0.0,
        "top_k": options.get("top_k"),
        "top_p": options.get("top_p"),
    }


class Tasks:
    """The tasks and groups behind the names that somebody asked for."""

    def __init__(self, manager: TaskManager, names: list[str]) -> None:
        """Their data is loaded here.

        Raises: ValueError when one runs code that a model writes, shows pictures, or wants a text that cannot be written so.
        """
        self._manager = manager
        self.loaded = {name: manager.load([name]) for name in names}
        for each in self.loaded.values():
            for name, task in each["tasks"].items():
                _check(name, task)

    def told(self, model: AskedModel, samples: int | None, shots: int | None) -> Iterator[dict[str, Any]]:
        """That a task begins, and its result as soon as it is there; that of a group behind its tasks."""
        for loaded in self.loaded.values():
            figures, hashes, shares = {}, {}, {}
            for name, task in loaded["tasks"].items():
                yield {"begun": name}
                results = simple_evaluate(
                    model=model,
                    tasks=[task],
                    task_manager=self._manager,
                    num_fewshot=shots,
                    limit=samples,
                    bootstrap_iters=RESAMPLES,
                    log_samples=True,
                    random_seed=SEED,
                    numpy_random_seed=SEED,
                    torch_random_seed=SEED,
                    fewshot_random_seed=SEED,
                )
                figures[name] = results["results"][name]
                hashes[name] = _hash_of_task(results["configs"][name], results["samples"][name])
                shares[name] = _shares(figures[name], results["samples"][name])
                result = {
                    "task": name,
                    "tasks": [name],
                    "hash": hashes[name],
                    "metrics": _metrics(figures[name], shares[name]),
                    "counts": {"items": results["n-samples"][name]["effective"]},
                    "method": {"version": str(results["versions"][name]), "shots": str(results["n-shot"][name])},
                }
                yield {"result": result}
            for name, group in loaded.get("groups", {}).items():
                if group.has_aggregation:
                    tasks = sorted(task.task_name for task in group.get_all_tasks())
                    summed = group.aggregate(figures)
                    result = {
                        "task": name,
                        "tasks": tasks,
                        "hash": _hash([group.to_dict(), [hashes[task] for task in tasks]]),
                        "metrics": _metrics(summed, set.intersection(*(shares[task] for task in tasks))),
                        "counts": {"items": summed["sample_len"], "tasks": len(tasks)},
                        "method": {"version": str(group.version)},
                    }
                    yield {"result": result}


def serve(channel: Channel) -> None:
    asked = channel.take()
    manager = TaskManager(include_path=asked["include"])
    known = set(manager.all_tasks)
    unknown = [name for name in asked["tasks"] if name not in known]
    channel.tell({"harness": version("lm_eval"), "unknown": unknown, "known": sorted(known) if unknown else []})
    if unknown:
        return
    tasks = Tasks(manager, asked["tasks"])
    channel.tell({"loaded": {name: list(each["tasks"]) for name, each in tasks.loaded.items()}})
    model = AskedModel(channel, **channel.take())
    for message in tasks.told(model, asked["samples"], asked["shots"]):
        channel.tell(message)
    channel.tell({"done": True})


def _check(name: str, task: Any) -> None:
    """Raises: ValueError when the task cannot be asked."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"{name} runs code that the model writes, which is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"{name} shows more than text, and the model reads only that")
    if options := getattr(getattr(task, "config", None), "generation_kwargs", None):
        try:
            _drawing(options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _metrics(figures: dict[str, Any], shares: set[str]) -> dict[str, tuple[float | None, float | None, bool]]:
    """(value, standard error, whether it is a share) of each, called by its name, and by its filter where that is not "none"."""
    found = {}
    for key, value in figures.items():
        name, comma, chosen = key.partition(",")
        if comma and not name.endswith("_stderr"):
            error = figures.get(f"{name}_stderr,{chosen}")
            found[name if chosen == "none" else key] = _number(value), _number(error), key in shares
    return found


def _shares(figures: dict[str, Any], samples: list[dict[str, Any]]) -> set[str]:
    """The figures that are means of what is within [0, 1] for every item, as an accuracy is; so is any mean of them."""
    found = set()
    for key in figures:
        name, _, chosen = key.partition(",")
        values = [_number(sample.get(name)) for sample in samples if sample.get("filter") == chosen]
        if values and all(value is not None and 0 <= value <= 1 for value in values):
            mean = math.fsum(values) / len(values)  # type: ignore[arg-type]
            if math.isclose(mean, _number(figures[key]) or 0.0, abs_tol=1e-9):
                found.add(key)
    return found


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # "N/A"
        return None
    return number if math.isfinite(number) else None


def _hash_of_task(config: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """Of its rules, and of every item as the model sees it."""
    rules = {name: value for name, value in config.items() if name not in PLACES}
    items = [[sample[f"{part}_hash"] for part in ("doc", "prompt", "target")] for sample in samples]
    return _hash([rules, items])


def _hash(asked: Any) -> str:
    text = json.dumps([version("lm_eval"), asked], sort_keys=True, default=str)
    return hashlib.sha256(ADDRESS.sub("", text).encode()).hexdigest()


if __name__ == "__main__":
    talk = Channel(int(sys.argv[1]), int(sys.argv[2]))
    try:
        serve(talk)
    except Exception as error:  # noqa: BLE001 - whatever a task's own code raises is told in a sentence
        traceback.print_exc()
        talk.tell({"failed": f"{type(error).__name__}: {error}"[:SHOWN_CHARACTERS]})
