"""Evaluate models: cut a text into windows, run the models on them one after the other, and compare the results.

One model is in memory at a time. The original runs once, before the others. Only its head and its hidden states (2 *
hidden_size bytes per token in 16 bit) stay in memory.

Letters: W windows, L tokens of a window, T tokens of the text.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmquant.checkpoints.quantized import parsed_quantization, storage_notes
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.data.chat import check_template
from llmquant.data.sources import ConversationRows, TextRows, load_conversations, load_rows
from llmquant.data.tokens import pieces
from llmquant.errors import UserError, one_line
from llmquant.eval.data import cut_windows, text_tokens
from llmquant.eval.divergence import Divergence, RecordedReference, divergence, record_reference
from llmquant.eval.perplexity import Perplexity, perplexity
from llmquant.hub import load_tokenizer, resolve_model
from llmquant.humanize import dtype_name
from llmquant.memory import trim_heap
from llmquant.models.skeleton import context_length, read_config
from llmquant.paths import parse_path
from llmquant.progress import OnProgress, Phase, Progress, ignore_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmquant.eval.tasks import TaskScore

DEFAULT_SEQ_LEN = 2048
"""Tokens of a window, as in the GPTQ paper."""
DEFAULT_DATASET = "wikitext2"
TOKENIZER_SAMPLE_CHARACTERS = 20_000
"""Length of the text on which the tokenizers of several models are compared."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of `evaluate`."""

    dataset: str | None = None
    """A source of `data.sources`, whose test split is used. None stands for wikitext2, or for no text if there are
    tasks and no original."""
    join: str = "auto"
    """How rows of the text are joined, as in `data.sources.load_rows`."""
    chat: bool = False
    """Whether the rows are conversations, which are put into the model's chat template."""
    seq_len: int | None = None
    """Tokens of a window; None for 2048, or for the shortest context of the models if that is less."""
    stride: int | None = None
    """Tokens from the start of a window to the start of the next; None for windows that do not overlap."""
    num_windows: int | None = None
    """Maximum number of windows; None for all windows of the text."""
    batch_size: int = 1
    """Number of windows, or of questions of a task, that run together."""
    tasks: Sequence[str] = ()
    """Names of tasks of lm-evaluation-harness."""
    task_folder: Path | None = None
    """Folder with .yaml files of further tasks."""
    num_examples: int | None = None
    """Maximum number of questions of each task; None for all."""
    device: str = "auto"
    """Device of the models: auto, cpu, cuda[:n]."""
    dtype: str = "auto"
    """dtype of the models: auto (the checkpoint's), float32, bfloat16, float16."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with the checkpoints."""


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """The measurements of one model."""

    model: str
    """Folder or hub id of the model."""
    stored_bytes: int
    """Bytes of all tensors of the checkpoint on disk."""
    device: str
    """Device on which the model ran."""
    dtype: str
    """dtype of the model's activations."""
    perplexity: Perplexity | None
    """Perplexity on the text; None if only tasks were run."""
    divergence: Divergence | None
    """Divergence from the original; None if there is none, and for the original itself."""
    tasks: dict[str, TaskScore]
    """Score of each task, by the name of the task."""

    def to_dict(self) -> dict[str, object]:
        """Return the fields as a dict for JSON."""
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
    """The measurements of several models on the same tokens."""

    dataset: str | None
    """Source of the text; None if only tasks were run."""
    against: ModelEvaluation | None
    """The original that the models are compared with; None if there is none."""
    models: tuple[ModelEvaluation, ...]
    """The models in the order in which they were given."""
    text_notes: tuple[str, ...] = ()
    """Descriptions of the changes that were made to the text while it was read."""
    notes: tuple[str, ...] = ()
    """Descriptions of ignored parts of the checkpoints. Each description begins with the name of its checkpoint."""

    def to_dict(self) -> dict[str, object]:
        """Return the fields as a dict for JSON."""
        return {
            "dataset": self.dataset,
            "against": self.against.to_dict() if self.against else None,
            "models": [model.to_dict() for model in self.models],
            "text_notes": list(self.text_notes),
            "notes": list(self.notes),
        }


def evaluate(
    models: Sequence[str],
    against: str | None = None,
    *,
    on_progress: OnProgress = ignore_progress,
    **options: Any,
) -> Evaluation:
    """Measure the perplexity of checkpoints, their divergence from `against`, and their scores in tasks.

    models, against: folders or hub ids, quantized or not. options: the fields of `EvaluationOptions`.
    Raises UserError if an option is invalid, if a checkpoint or text cannot be read, if the text is too short, or if a
    loss is not finite.
    """
    chosen = _with_defaults(EvaluationOptions(**options), has_original=against is not None)
    names = [*([against] if against is not None else []), *models]
    folders = [resolve_model(name, chosen.trust_remote_code) for name in names]
    if chosen.tasks:
        from llmquant.eval.tasks import check_tasks

        check_tasks(chosen.tasks, chosen.task_folder)
    text = None if chosen.dataset is None else _load_text(chosen.dataset, chosen)
    readers = [CheckpointReader(folder) for folder in folders]
    for reader in readers:
        parsed_quantization(reader)
    windows_WL = None if text is None else _windows(folders, text, chosen)
    evaluator = _Evaluator(chosen, windows_WL, against is not None, len(names), on_progress)
    results = [evaluator.run(name, reader) for name, reader in zip(names, readers, strict=True)]
    return Evaluation(
        dataset=chosen.dataset,
        against=results.pop(0) if against is not None else None,
        models=tuple(results),
        text_notes=() if text is None else text.notes,
        notes=tuple(
            f"{name}: {note}" for name, reader in zip(names, readers, strict=True) for note in storage_notes(reader)
        ),
    )


def _with_defaults(options: EvaluationOptions, *, has_original: bool) -> EvaluationOptions:
    """Return the options with the default dataset if a text is needed, and with a parsed path of the task folder."""
    dataset = options.dataset
    if dataset is None and (has_original or not options.tasks):
        dataset = DEFAULT_DATASET
    task_folder = None if options.task_folder is None else parse_path(options.task_folder)
    return replace(options, dataset=dataset, task_folder=task_folder)


class _Evaluator:
    """Runs models one after the other, and keeps the recorded predictions of the original."""

    def __init__(
        self,
        options: EvaluationOptions,
        windows_WL: Tensor | None,
        has_original: bool,
        num_models: int,
        on_progress: OnProgress,
    ) -> None:
        """windows_WL: int64 tokens, or None for no text. has_original: whether the first model is the original."""
        self._options = options
        self._windows_WL = windows_WL
        self._has_original = has_original
        self._original: RecordedReference | None = None
        self._num_models = num_models
        self._num_loaded = 0
        self._on_progress = on_progress

    def run(self, name: str, reader: CheckpointReader) -> ModelEvaluation:
        """Load a model, measure it, and free its memory."""
        model = _load(reader.path, self._windows_WL, self._options)
        self._num_loaded += 1
        self._on_progress(Progress(Phase.LOADING, self._num_loaded, self._num_models))
        scores = self._run_tasks(model, reader.path)
        measured, compared = self._run_windows(model)
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        result = ModelEvaluation(
            model=name,
            stored_bytes=reader.total_bytes,
            device=str(parameter.device),
            dtype=dtype_name(parameter.dtype),
            perplexity=measured,
            divergence=compared,
            tasks=scores,
        )
        del model, parameter
        _free_memory()
        return result

    def _run_tasks(self, model: Any, folder: Path) -> dict[str, TaskScore]:
        if not self._options.tasks:
            return {}
        from llmquant.eval.tasks import run_tasks

        return run_tasks(
            model,
            load_tokenizer(folder, self._options.trust_remote_code),
            self._options.tasks,
            folder=self._options.task_folder,
            num_examples=self._options.num_examples,
            batch_size=self._options.batch_size,
        )

    def _run_windows(self, model: Any) -> tuple[Perplexity | None, Divergence | None]:
        """Return perplexity and divergence of a model. The original is recorded instead of being compared."""
        if self._windows_WL is None:
            return None, None
        options: dict[str, Any] = {"stride": self._options.stride, "batch_size": self._options.batch_size}
        if not self._has_original:
            return perplexity(model, self._windows_WL, self._on_window, **options), None
        if self._original is None:
            self._original = record_reference(model, self._windows_WL, self._on_window, **options)
            self._original.body_and_head.free_body()
            return self._original.perplexity, None
        compared = divergence(model, self._original, self._windows_WL, self._on_window, **options)
        return compared.model, compared

    def _on_window(self, done: int, total: int) -> None:
        """Report progress over the windows of all models. done, total: windows of the current model."""
        self._on_progress(Progress(Phase.WINDOWS, (self._num_loaded - 1) * total + done, self._num_models * total))


def _load_text(dataset: str, options: EvaluationOptions) -> TextRows | ConversationRows:
    return load_conversations(dataset) if options.chat else load_rows(dataset, join=options.join)


def _windows(folders: Sequence[Path], text: TextRows | ConversationRows, options: EvaluationOptions) -> Tensor:
    """Cut a text into windows, int64 [W, L], with the tokenizer of the first model.

    Raises UserError if the tokenizer of another model differs, if the windows are longer than a model's context, or if
    the text is too short.
    """
    dataset, seq_len, trust_remote_code = str(options.dataset), options.seq_len, options.trust_remote_code
    context = min(context_length(read_config(folder, trust_remote_code)) for folder in folders)
    if seq_len is not None and seq_len > context:
        raise UserError(f"seq_len {seq_len}: the model's context is {context} tokens; use --seq-len {context} or less")
    tokenizer = load_tokenizer(folders[0], trust_remote_code)
    is_chat = isinstance(text, ConversationRows)
    segments = list(
        _apply_template(tokenizer, text, dataset) if isinstance(text, ConversationRows) else text.segments()
    )
    sample = next(pieces(segments), "")[:TOKENIZER_SAMPLE_CHARACTERS]
    for folder in folders[1:]:
        if any(folder.glob("tokenizer*")) and not torch.equal(
            text_tokens(load_tokenizer(folder, trust_remote_code), sample), text_tokens(tokenizer, sample)
        ):
            raise UserError(
                f"{folder}: its tokenizer splits the text into other tokens than the tokenizer of {folders[0]}, so "
                f"losses per token cannot be compared; evaluate each model with a command of its own"
            )
    tokens_T = text_tokens(tokenizer, segments, add_special=not is_chat)
    length = seq_len or int(min(DEFAULT_SEQ_LEN, context))
    return cut_windows(tokens_T, length, options.stride, options.num_windows, source=dataset)


def _apply_template(tokenizer: PreTrainedTokenizerBase, conversations: ConversationRows, name: str) -> Iterator[str]:
    """Yield every conversation as text in the model's chat template. Raises UserError if the template refuses one."""
    check_template(tokenizer)
    number = 0
    try:
        for messages in conversations.rows:
            number += 1
            yield str(tokenizer.apply_chat_template(messages, tokenize=False))
    # A template is a program. Its own checks and jinja raise different errors if it does not support the messages.
    except Exception as error:
        raise UserError(
            f"{name}: the model's chat template does not take conversation {number} ({one_line(error)}); "
            f"change or delete it, or leave out --chat"
        ) from error


def _load(folder: Path, windows_WL: Tensor | None, options: EvaluationOptions) -> Any:
    """Load a model. Raises UserError if it has no embedding for a token of the windows."""
    from llmquant.runtime.attention import use_attention
    from llmquant.runtime.load import load

    model = load(folder, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code).eval()
    use_attention(model)
    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    if windows_WL is not None and (largest := int(windows_WL.max())) >= vocabulary_size:
        raise UserError(
            f"{folder}: the text has token {largest}, but the model has only {vocabulary_size}; replace the "
            f"tokenizer's files, which belong to another model"
        )
    return model


def _free_memory() -> None:
    """Free the memory of a deleted model. Only garbage collection frees the cycles of its hooks and modules."""
    gc.collect()
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
