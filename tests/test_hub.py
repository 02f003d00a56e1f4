"""`hub.py`: the folder of a model, and its tokenizer."""

import pytest

from llmquant.errors import UserError
from llmquant.hub import load_tokenizer, resolve_model


def test_a_folder_is_returned_as_it_is(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name").is_dir()


def test_hub_id_fetches_weights_configuration_and_tokenizer_only(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    files = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "pytorch_model.bin",
        "modeling_custom.py",
        "consolidated.safetensors",
        "original/model.safetensors",
        "model.gguf",
    ]
    fetched = []

    def snapshot_download(repo_id, *, allow_patterns, ignore_patterns):
        def matches(file, patterns):
            return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)

        fetched.extend(f for f in files if matches(f, allow_patterns) and not matches(f, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name") == tmp_path
    assert fetched == files[:6]


@pytest.mark.parametrize("name", ["/no/such/place", "./nothing", "~/nothing", "a/b/c", "two words"])
def test_a_name_that_can_only_be_a_folder_is_not_looked_up_on_the_hub(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was contacted"))
    with pytest.raises(UserError, match=f"^{name}: no such folder; give a folder"):
        resolve_model(name)


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UserError, match=r"model\.safetensors: is a file; give the folder"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~no-such-user/m", "no such user"),
        ("n" * 300, "longer than a name may be"),
        ("", "not a path"),
        ("\udcff", "UTF-8"),
    ],
)
def test_an_impossible_path_is_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message):
        resolve_model(name)


def test_an_unreachable_hub_is_reported_in_one_line():
    with pytest.raises(UserError) as error:
        resolve_model("org/name")
    message = str(error.value)
    assert message.startswith("org/name: no such folder, and the Hugging Face hub cannot provide it (")
    assert "\n" not in message


def test_tokenizer_of_a_checkpoint_is_loaded(tiny_model):
    assert load_tokenizer(tiny_model("llama"))("x = 1")["input_ids"]


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_missing_or_damaged_tokenizer_is_refused(tiny_model, tmp_path, content):
    import shutil

    shutil.copy(tiny_model("llama") / "config.json", tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded .*; copy tokenizer\.json"):
        load_tokenizer(tmp_path)
