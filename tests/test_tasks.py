"""Tasks of lm-evaluation-harness, run on local questions without a network, score what a plain loop scores."""

import importlib.util
import json

import pytest
import torch
from commands import command
from tiny_models import ARCHITECTURES, random_model, tiny_tokenizer

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install llmquant[tasks]",
)
# The harness and its dependencies emit warnings that this project cannot fix.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

QUESTIONS = [
    {"question": f"for x in range({number}):", "choices": [" print(x)", " return", " x = 1"], "answer": number % 3}
    for number in range(6)
]
TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{questions}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    """A folder with one task; the harness caches the questions next to the folder."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local.yaml").write_text(TASK.format(questions=questions))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


def plain_accuracy(model, tokenizer, questions):
    """Fraction of the questions whose most likely choice is the answer."""
    right = 0
    for question in questions:
        start = tokenizer(question["question"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(question["question"] + choice)["input_ids"]
            with torch.inference_mode():
                log_p_LV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_p_LV[at - 1, ids[at]].item() for at in range(len(start), len(ids))))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(questions)


@needs_harness
def test_local_task_scores_what_a_plain_loop_scores(task_folder):
    from llmquant.eval.tasks import run_tasks

    tokenizer, scores = tiny_tokenizer(), []
    for seed in range(2):
        model = random_model(ARCHITECTURES["llama"](), seed=seed)
        score = run_tasks(model, tokenizer, ["local_questions"], folder=task_folder, batch_size=4)["local_questions"]
        assert score.metrics["acc"] == pytest.approx(plain_accuracy(model, tokenizer, QUESTIONS))
        assert score.num_examples == 6
        assert score.standard_errors["acc"] > 0 or score.metrics["acc"] in (0, 1)
        scores.append(score.metrics["acc"])
    first = run_tasks(model, tokenizer, ["local_questions"], folder=task_folder, num_examples=2)["local_questions"]
    assert first.metrics["acc"] == pytest.approx(plain_accuracy(model, tokenizer, QUESTIONS[:2]))
    assert first.num_examples == 2


@needs_harness
def test_eval_runs_tasks_on_a_quantized_checkpoint(task_folder, tiny_model, tmp_path, monkeypatch, capsys):
    import llmquant

    model = str(tiny_model("llama"))
    recipe = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(bits=8, group_size=32))
    llmquant.quantize(model, tmp_path / "small", recipe)
    capsys.readouterr()
    options = ["--tasks", "local_questions", "--task-folder", task_folder]
    assert command(monkeypatch, "eval", tmp_path / "small", model, *options, "--json", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    printed = json.loads(captured.out)
    assert printed["dataset"] is None
    expected = plain_accuracy(random_model(ARCHITECTURES["llama"]()), tiny_tokenizer(), QUESTIONS)
    for row in printed["models"]:
        assert row["tasks"]["local_questions"]["metrics"]["acc"] == pytest.approx(expected)
        assert row["perplexity"] is None
    assert command(monkeypatch, "eval", model, *options) == 0
    assert f"{expected:.4f}" in capsys.readouterr().out


@needs_harness
def test_unknown_task_is_refused_before_a_model_is_loaded(task_folder, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: type("Few", (), {"all_tasks": ["arc_easy"]}))
    monkeypatch.setattr("llmquant.runtime.load.load", lambda *_, **__: pytest.fail("loaded"))
    options = ["--tasks", "arc_easy,nonesuch", "--task-folder", task_folder]
    assert command(monkeypatch, "eval", tiny_model("llama"), *options) == 2
    assert "task 'nonesuch': lm-evaluation-harness has no such task" in capsys.readouterr().err


def test_tasks_without_the_harness_are_refused_with_the_package_to_install(tiny_model, monkeypatch, capsys):
    from llmquant.eval import tasks

    tasks._task_manager.cache_clear()
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    assert command(monkeypatch, "eval", tiny_model("llama"), "--tasks", "arc_easy") == 2
    assert "run `pip install llmquant[tasks]`" in capsys.readouterr().err
    assert command(monkeypatch, "eval", tiny_model("llama"), "--examples", "3") == 2
    assert "--task-folder and --examples go with --tasks" in capsys.readouterr().err
