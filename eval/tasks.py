"""Benchmark tasks (arc_easy, hellaswag, …), run by EleutherAI's lm-evaluation-harness.

The harness is an optional extra: `pip install llmquant[tasks]`. A loaded model is wrapped in the harness's own class
`HFLM`, so the harness also runs quantized checkpoints of formats that it cannot open.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Scores of a model in one task."""

    metrics: dict[str, float]
    """Values of the metrics, by the harness's names: `acc`, `acc_norm`, `exact_match` with its filter after a comma."""
    standard_errors: dict[str, float]
    """Standard errors of the metrics that have one, by the metric's name."""
    num_examples: int
    """Number of questions of the task that were run; 0 for a group of tasks, whose members have their own numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


def check_tasks(tasks: Sequence[str], folder: Path | None = None) -> None:
    """Raise UserError unless the harness is installed and can find every task.

    folder: .yaml files of additional tasks.
    """
    _task_manager(tuple(tasks), folder)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    num_examples: int | None = None,
    batch_size: int = 1,
) -> dict[str, TaskScore]:
    """Run tasks on a loaded model. Return the scores by name, for groups of tasks and for their members too.

    folder: .yaml files of additional tasks. num_examples: number of questions from the start of each task; None for
    all. Raises UserError for an unknown task, and for a data set that cannot be loaded.
    """
    manager = _task_manager(tuple(tasks), folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if num_examples is not None and num_examples < 1:
        raise UserError(f"examples {num_examples}: at least 1 is needed; leave out --examples to run all")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        results = simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=num_examples, log_samples=False
        )
    # Questions come from the hub or from files, whose errors have no common base class.
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"tasks {','.join(tasks)}: cannot be run ({reason}); check the network, or use local questions with "
            f"--task-folder"
        ) from error
    counts = results.get("n-samples", {})
    return {
        name: _score(values, counts.get(name, {}).get("effective", 0)) for name, values in results["results"].items()
    }


def _score(values: dict[str, Any], num_examples: int) -> TaskScore:
    """Return the score from one task's results, whose keys include `metric,filter` and `metric_stderr,filter`."""
    metrics, errors = {}, {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue
        name = metric if kind == "none" else f"{metric},{kind}"
        if metric.endswith("_stderr"):
            errors[name.replace("_stderr", "", 1)] = float(value)
        else:
            metrics[name] = float(value)
    return TaskScore(metrics=metrics, standard_errors=errors, num_examples=num_examples)


@functools.cache
def _task_manager(tasks: tuple[str, ...], folder: Path | None) -> Any:
    """Return the harness's task manager. Raises UserError for an unknown task.

    The harness reads thousands of files to find its own tasks, so the tasks are first looked up in the folder alone.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks: lm-evaluation-harness is not installed; run `pip install llmquant[tasks]`")
    if folder is not None and not folder.is_dir():
        raise UserError(f"task_folder {folder}: no such folder; use a folder with .yaml files of tasks")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in set(manager.all_tasks)]:
        nor_folder = "" if folder is None else f", nor is it in {folder}"
        raise UserError(
            f"task '{unknown[0]}': lm-evaluation-harness has no such task{nor_folder}; `lm-eval ls tasks` lists all"
        )
    return manager
