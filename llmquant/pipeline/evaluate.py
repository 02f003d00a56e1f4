"""`llmquant eval` as one function: cut a text into windows, run the models over them one after the other, compare.

At any time the memory holds one model, and of the original to compare with only its head and its hidden states
(2 * hidden_size bytes a token in 16 bit): it runs once, before the others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmquant.chat import check_template
from llmquant.checkpoints.quantized import parsed_quantization, storage_notes
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError, first_words
from llmquant.eval.data import cut, text_tokens
from llmquant.eval.divergence import Divergence, Recorded, divergence, record
from llmquant.eval.perplexity import Perplexity, perplexity
from llmquant.hub import load_tokenizer, resolve_model
from llmquant.memory import give_back
from llmquant.models.skeleton import context_length, read_config
from llmquant.paths import typed_path
from llmquant.textdata import Conversations, TextRows, load_conversations, load_rows
from llmquant.tokens import pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmquant.eval.tasks import TaskScore

DEFAULT_SEQ_LEN = 2048
"""Tokens of a window in the GPTQ paper."""
DEFAULT_DATASET = "wikitext2"
SAMPLE_CHARACTERS = 20_000
"""Text on which the tokenizers of several models are compared."""

OnStep = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """What was measured of one model."""

    model: str
    stored_bytes: int
    """Bytes of all tensors on the disk."""
    device: str
    """Where it ran."""
    dtype: str
    """dtype of its activations."""
    perplexity: Perplexity | None
    """None where only tasks were asked for."""
    divergence: Divergence | None
    """From the original; None without one."""
    tasks: dict[str, TaskScore]
    """By name of the task."""

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "stored_bytes": self.stored_bytes,
            "device": self.device,
            "dtype": self.dtype,
            "perplexity": self.perplexity.to_dict() if self.perplexity else None,
            "divergence": self.divergence.to_dict() if self.divergence else None,
            "tasks": {name: score.to_dict() for name, score in self.tasks.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Several models on the same tokens."""

    dataset: str | None
    """None where only tasks were asked for."""
    against: ModelEvaluation | None
    """The original that the others are compared with."""
    models: tuple[ModelEvaluation, ...]
    remarks: tuple[str, ...] = ()
    """What was changed while the text was read, in words."""
    notes: tuple[str, ...] = ()
    """What is unusual about a checkpoint and was ignored, in words, with the checkpoint's name in front."""

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "dataset": self.dataset,
            "against": self.against.to_dict() if self.against else None,
            "models": [model.to_dict() for model in self.models],
            "remarks": list(self.remarks),
            "notes": list(self.notes),
        }


def evaluate(
    models: Sequence[str],
    against: str | None = None,
    *,
    dataset: str | None = None,
    join: str = "auto",
    chat: bool = False,
    seq_len: int | None = None,
    stride: int | None = None,
    num_windows: int | None = None,
    batch_size: int = 1,
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
    num_examples: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_step: OnStep = lambda what, done, total: None,
) -> Evaluation:
    """Perplexity of checkpoints, quantized or not, with `against` their divergence from that one, and their tasks.

    models, against: folders or hub ids. dataset, join: as `textdata.load_rows`, the test split; None for wikitext2, or
    for no text at all where tasks are given and `against` is not. chat: the rows are conversations, put into the chat
    template. seq_len: tokens of a window; None for 2048, or the shortest context of the models. stride: from window to
    window; None: they do not overlap. num_windows: None for all that the text fills. batch_size: windows, or questions
    of a task, that run side by side. tasks, task_folder, num_examples: as `eval.tasks.run_tasks`. trust_remote_code:
    run the code that comes with the checkpoints.
    Raises UserError for what cannot be read, is too short, or gives numbers that are not finite.
    """
    task_folder = None if task_folder is None else typed_path(task_folder)
    names = [*([against] if against is not None else []), *models]
    paths = [resolve_model(name, trust_remote_code) for name in names]
    if tasks:
        from llmquant.eval.tasks import check_tasks

        check_tasks(tasks, task_folder)
    if dataset is None and (against is not None or not tasks):
        dataset = DEFAULT_DATASET
    source = None if dataset is None else load_conversations(dataset) if chat else load_rows(dataset, join=join)
    readers = [CheckpointReader(path) for path in paths]
    for reader in readers:
        parsed_quantization(reader)
    windows_WL = None
    if source is not None:
        windows_WL = _windows(paths, source, str(dataset), seq_len, stride, num_windows, trust_remote_code)
    steps = _Steps(on_step, len(names), 0 if windows_WL is None else len(windows_WL))
    recorded: Recorded | None = None
    results = []
    for name, path, reader in zip(names, paths, readers, strict=True):
        model = _load(path, device, dtype, windows_WL, trust_remote_code)
        steps.loaded()
        options: dict[str, Any] = {"stride": stride, "batch_size": batch_size}
        scores = {}
        if tasks:
            from llmquant.eval.tasks import run_tasks

            tokenizer = load_tokenizer(path, trust_remote_code)
            scores = run_tasks(
                model, tokenizer, tasks, folder=task_folder, num_examples=num_examples, batch_size=batch_size
            )
        measured: Perplexity | None = None
        compared: Divergence | None = None
        if windows_WL is None:
            pass
        elif against is None:
            measured = perplexity(model, windows_WL, steps.window, **options)
        elif recorded is None:
            recorded = record(model, windows_WL, steps.window, **options)
            recorded.halves.forget_body()
            measured = recorded.perplexity
        else:
            compared = divergence(model, recorded, windows_WL, steps.window, **options)
            measured = compared.model
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        results.append(
            ModelEvaluation(
                model=name,
                stored_bytes=reader.total_bytes,
                device=str(parameter.device),
                dtype=str(parameter.dtype).removeprefix("torch."),
                perplexity=measured,
                divergence=compared,
                tasks=scores,
            )
        )
        del model, parameter
        _release()
    original = results.pop(0) if against is not None else None
    remarks = () if source is None else source.remarks
    notes = tuple(
        f"{name}: {note}" for name, reader in zip(names, readers, strict=True) for note in storage_notes(reader)
    )
    return Evaluation(dataset=dataset, against=original, models=tuple(results), remarks=remarks, notes=notes)


@dataclass
class _Steps:
    """Counts models and windows for a progress display."""

    on_step: OnStep
    num_models: int
    num_windows: int
    models: int = 0

    def loaded(self) -> None:
        self.models += 1
        self.on_step("loading", self.models, self.num_models)

    def window(self, done: int, total: int) -> None:
        self.on_step("windows", (self.models - 1) * total + done, self.num_models * self.num_windows)


def _windows(
    paths: Sequence[Path],
    source: TextRows | Conversations,
    name: str,
    seq_len: int | None,
    stride: int | None,
    num_windows: int | None,
    trust_remote_code: bool,
) -> Tensor:
    """int64 [W, L], by the tokenizer of the first model, which must be that of all."""
    context = min(context_length(read_config(path, trust_remote_code)) for path in paths)
    if seq_len is not None and seq_len > context:
        raise UserError(f"seq_len {seq_len}: the model's context is {context} tokens; use --seq-len {context} or less")
    tokenizer = load_tokenizer(paths[0], trust_remote_code)
    chat = isinstance(source, Conversations)
    parts = list(_templated(tokenizer, source, name) if isinstance(source, Conversations) else source.parts())
    sample = next(pieces(parts), "")[:SAMPLE_CHARACTERS]
    for path in paths[1:]:
        if any(path.glob("tokenizer*")) and not torch.equal(
            text_tokens(load_tokenizer(path, trust_remote_code), sample), text_tokens(tokenizer, sample)
        ):
            raise UserError(
                f"{path}: its tokenizer makes other tokens of the text than that of {paths[0]}, so that losses per "
                f"token do not compare; evaluate the two in commands of their own"
            )
    tokens_T = text_tokens(tokenizer, parts, special=not chat)
    length = seq_len or int(min(DEFAULT_SEQ_LEN, context))
    return cut(tokens_T, length, stride, num_windows, source=name)


def _templated(tokenizer: PreTrainedTokenizerBase, source: Conversations, name: str) -> Iterator[str]:
    """Every conversation as the chat template writes it."""
    check_template(tokenizer)
    number = 0
    try:
        for chat in source.chats:
            number += 1
            yield str(tokenizer.apply_chat_template(chat, tokenize=False))
    # A template is a program: it refuses roles and orders of messages by errors of its own and of jinja.
    except Exception as error:
        raise UserError(
            f"{name}: the model's chat template does not take conversation {number} ({first_words(error)}); "
            f"change or delete it, or leave out --chat"
        ) from error


def _load(path: Path, device: str, dtype: str, windows_WL: Tensor | None, trust_remote_code: bool) -> Any:
    from llmquant.runtime.attention import use_attention
    from llmquant.runtime.load import load

    model = load(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    use_attention(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if windows_WL is not None and (largest := int(windows_WL.max())) >= vocabulary:
        raise UserError(
            f"{path}: the text has token {largest}, the model has {vocabulary}; the tokenizer's files are those of "
            f"another model"
        )
    return model


def _release() -> None:
    """Give back the memory of a model that nothing refers to any more: hooks and modules refer to each other."""
    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
