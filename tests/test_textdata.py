"""Rows from every source, and how they join."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from llmquant.errors import UserError
from llmquant.textdata import PRESETS, PYTHON_DOCS, load_rows


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize("text", ["one\ntwo\n\n three", "a\r\nb\n", "x", "\n\nx\n", "a = 1\n \nb = 2\n", " \nwords\n"])
def test_text_file_is_taken_as_it_stands(tmp_path, text):
    assert load_rows(write(tmp_path, "a.txt", text)).text == text


def test_raw_wikitext_file_gives_the_rows_of_the_data_set(tmp_path):
    loaded = load_rows(write(tmp_path, "test.txt", " \n = Title = \n \n Some words . \n"))
    assert loaded.rows == ["", " = Title = \n", "", " Some words . \n"]
    assert loaded.text == "\n\n = Title = \n\n\n\n\n Some words . \n"


def test_join_text_of_raw_wikitext_is_the_file_without_its_blank_lines(tmp_path):
    text = " \n = Title = \n \n Some words . \n"
    path = write(tmp_path, "test.txt", text)
    assert load_rows(path, join="text").text == text.replace("\n \n", "\n").removeprefix(" \n")


def test_join_rows_puts_a_blank_line_between_the_lines_of_a_text(tmp_path):
    assert load_rows(write(tmp_path, "a.txt", "one\ntwo"), join="rows").text == "one\n\n\ntwo"


def test_jsonl_and_parquet_rows_are_texts_or_the_contents_of_chats(tmp_path):
    records = [{"text": "one\n"}, {"text": ""}, {"text": "two"}]
    jsonl = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, records)) + "\n")
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), parquet)
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    chats = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat]), chats)

    assert load_rows(jsonl).rows == load_rows(str(parquet)).rows == ["one\n", "", "two"]
    assert load_rows(jsonl).text == "one\n\n\n\n\ntwo"
    chat_jsonl = write(tmp_path, "chats.jsonl", json.dumps(chat))
    assert load_rows(chat_jsonl).rows == load_rows(str(chats)).rows == ["Hi\nHello"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{oops\n', "line 2: not JSON"),
        ("a.jsonl", '{"body": "x"}\n', 'line 1: holds neither "text"'),
        ("a.jsonl", '{"messages": [{"content": 3}]}', 'line 1: holds neither "text"'),
        ("a.parquet", "not parquet", "not a readable parquet file"),
        ("a.txt", " \n\n", "holds no text"),
        ("a.csv", "x", r"type \.csv is not read"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_their_name(tmp_path, name, content, message):
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        load_rows(write(tmp_path, name, content))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 text .* at byte 3"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["wikitext3", "some/where", "missing.txt", "."])
def test_unknown_source_is_refused_with_what_there_is(name):
    with pytest.raises(UserError, match=r"no such file.*wikitext2, c4, ptb"):
        load_rows(name)


def test_unknown_join_is_refused():
    with pytest.raises(UserError, match="join 'lines': not one of auto, rows, text"):
        load_rows(PYTHON_DOCS, join="lines")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_without_a_hub_says_what_to_do(name):
    with pytest.raises(UserError, match=rf"{name}: cannot be read from the Hugging Face hub .* local .*python-docs"):
        load_rows(name)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_reads_its_column_of_the_asked_split(name, monkeypatch):
    import datasets

    asked = {}

    def load_dataset(loader, *, data_files, split, streaming):
        asked.update(loader=loader, data_files=data_files, split=split, streaming=streaming)
        return ({PRESETS[name].column: f"row {number}", "other": 1} for number in range(2000))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    preset = PRESETS[name]
    loaded = load_rows(name, split="validation")
    assert loaded.rows[1] == "row 1"
    assert len(loaded.rows) == (preset.max_rows or 2000)
    assert loaded.text.startswith(f"row 0{preset.joiner}row 1")
    assert asked == {
        "loader": preset.loader,
        "data_files": preset.files["validation"],
        "split": "train",
        "streaming": preset.max_rows is not None,
    }
    assert set(preset.files) == {"train", "validation", "test"}
    with pytest.raises(UserError, match="has no split 'dev'; its splits are train, validation, test"):
        load_rows(name, split="dev")


def test_python_docs_is_always_there():
    assert len(load_rows(PYTHON_DOCS).text) > 200_000
