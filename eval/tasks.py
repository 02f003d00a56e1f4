"""Questions with known answers (arc_easy, hellaswag, …), asked through EleutherAI's lm-evaluation-harness.

The harness is an optional extra: `pip install llmquant[tasks]`. It gets a model that is already loaded, wrapped as one
of its own, so that quantized checkpoints of any format run here that the harness itself could not open.
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
    """What a model reached in one task."""

    metrics: dict[str, float]
    """By the harness's name: `acc`, `acc_norm`, `exact_match` with its filter behind a comma, …"""
    standard_errors: dict[str, float]
    """Of those metrics that have one."""
    num_examples: int
    """Questions asked; 0 for a group of tasks, whose members count theirs."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check_tasks(tasks: Sequence[str], folder: Path | None = None) -> None:
    """UserError unless the harness is installed and knows every task, by itself or from the .yaml files of `folder`."""
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
    """Scores by task name, groups and their members among them.

    folder: .yaml files of tasks that the harness does not bring. num_examples: only the first questions of each task.
    Raises UserError for an unknown task, and for data that cannot be had.
    """
    manager = _task_manager(tuple(tasks), folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if num_examples is not None and num_examples < 1:
        raise UserError(f"examples {num_examples}: at least 1 is needed; leave --examples out to ask all")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        results = simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=num_examples, log_samples=False
        )
    # Questions come from the hub or from files: what can fail on that way has no common base.
    except (OSError, ValueError, ImportError) as error:
        words = " ".join(str(error).split())[:150]
        raise UserError(
            f"tasks {','.join(tasks)}: cannot be run ({words}); check the network, or give local questions with "
            f"--task-folder"
        ) from error
    counts = results.get("n-samples", {})
    return {
        name: _score(values, counts.get(name, {}).get("effective", 0)) for name, values in results["results"].items()
    }


def _score(values: dict[str, Any], num_examples: int) -> TaskScore:
    """From the harness's flat table: keys are `metric,filter` and `metric_stderr,filter`, among other things."""
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
    """What finds the tasks. The harness reads thousands of files for its own, so the folder is tried alone first."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks: need lm-evaluation-harness, which is not installed; run `pip install llmquant[tasks]`")
    if folder is not None and not folder.is_dir():
        raise UserError(f"task_folder {folder}: no such folder; give one with .yaml files of tasks")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in set(manager.all_tasks)]:
        where = "" if folder is None else f", nor {folder}"
        raise UserError(
            f"task '{unknown[0]}': lm-evaluation-harness does not know it{where}; `lm-eval ls tasks` lists all"
        )
    return manager
