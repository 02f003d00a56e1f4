"""Rows of text from presets, files and records, and their joiners."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmquant.data.files import text_lines
from llmquant.data.sources import PRESETS, PYTHON_DOCS, load_conversations, load_rows
from llmquant.errors import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"function": {"name": "add", "arguments": {"a": "é"}}}
MANY = 3000
"""More rows than one batch of a parquet file."""


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("text", ["one\ntwo\n\n three", "a\r\nb\n", "x", "\n\nx\n", "a = 1\n \nb = 2\n", " \nwords\n"])
def test_text_file_is_read_unchanged(tmp_path, text):
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
        ("a.jsonl", '{"body": "x", "id": 1}\n', "its fields are 'body', 'id'; rename"),
        ("a.jsonl", '{"messages": [{"content": 3}]}', 'line 1: field "content" of a message holds a number'),
        ("a.jsonl", '{"messages": [{"role": "user", "body": "x"}]}', "its fields are 'role', 'body'; rename"),
        ("a.jsonl", '{"messages": 3}', 'line 1: field "messages" holds a number'),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', 'line 2: field "text" holds a number'),
        ("a.jsonl", '{"text": "x"}\n3', "line 2: holds neither .* it is a number"),
        ("a.jsonl", '{"text": "x"}\n{}', "line 2: holds neither .* it has no fields"),
        ("a.jsonl", '{"text": null}\n{"text": null}', "holds no text"),
        ("a.jsonl", '{"text": "x"}\n{"text": "cut o', "line 2: not JSON .*Unterminated string.* delete it"),
        ("a.jsonl", '// rows\n{"text": "x"}', "line 1: not JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1: not JSON"),
        ("a.jsonl", '{"a":' * 100_000, "line 1: not JSON"),
        ("a.json", '[{"text": "x"},', "not JSON .*one array of records is needed"),
        ("a.json", "[]", "holds no text"),
        ("a.json", '{"rows": ["x"]}', "its fields are 'rows'"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"not UTF-8 text \(0xe9 in line 1, at byte 13\)"),
        ("a.txt", "one\ntwo\0\n", "line 2: holds a NUL character"),
        ("a.txt", "words".encode("utf-16-le"), "line 1: holds a NUL character, .* UTF-16 without a byte order mark"),
        ("a.txt", "\ufeffwords".encode("utf-16-le")[:-1], "not UTF-16 text"),
        ("a.txt", "", "holds no text"),
        ("a.jsonl.gz", '{"text": "x"}', "cannot be read .*gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], "cannot be read"),
        ("a.txt.xz", lzma.compress(b"words")[:-9], "cannot be read"),
        ("a.txt.bz2", "words", "cannot be read"),
        ("a.txt.zst", "words", "cannot be read"),
        ("a.raw", "words", r"type \.raw is not read.*rename a file of plain text to the suffix \.txt"),
        ("a.parquet", "not parquet", "not a readable parquet file"),
        ("a.txt", " \n\n", "holds no text"),
        ("a.csv", "x", r"type \.csv is not read"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_their_name(tmp_path, name, content, message):
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        load_rows(write(tmp_path, name, content))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_mark_is_no_text(encoding, tmp_path):
    lines = '{"text": "ein Übel"}\n{"text": "two"}\n'
    assert load_rows(write(tmp_path, "a.txt", "ein Übel\r\ntwo".encode(encoding))).text == "ein Übel\r\ntwo"
    assert load_rows(write(tmp_path, "a.jsonl", lines.encode(encoding))).rows == ["ein Übel", "two"]
    # `cat a.jsonl b.jsonl` leaves a byte order mark within the file.
    twice = lines.encode("utf-8-sig") * 2
    assert load_rows(write(tmp_path, "b.jsonl", twice)).rows == ["ein Übel", "two"] * 2


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.JSONL", bytes),
        ("a.ndjson", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.JSONL.GZ", gzip.compress),
        ("a.jsonl.bz2", bz2.compress),
        ("a.json.xz", lzma.compress),
        ("a.jsonl.zst", zstd),
    ],
)
def test_records_are_read_from_files_with_any_known_suffix(name, pack, tmp_path):
    lines = b'{"text": "one"}\r\n\n  \n{"text": null}\nnull\n{"text": "two"}'
    assert load_rows(write(tmp_path, name, pack(lines))).rows == ["one", "", "", "two"]
    array = json.dumps([{"text": "one"}, "two"], indent=1).encode()
    assert load_rows(write(tmp_path, name, pack(array))).rows == ["one", "two"]


def test_text_files_may_be_markdown_or_compressed(tmp_path):
    for name, content in (("a.TXT", b"one\n"), ("a.md", b"one\n"), ("a.txt.gz", gzip.compress(b"one\n"))):
        assert load_rows(write(tmp_path, name, content)).text == "one\n"


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    lines = r'{"text": "cut \ud83d off \ud83d\ude00 \udc00 \\ud83d"}' + "\n"
    loaded = load_rows(write(tmp_path, "a.jsonl", lines))
    assert loaded.rows == ["cut \ufffd off 😀 \ufffd \\ud83d"]
    assert loaded.notes == ("lone surrogates (halves of characters that were cut in two) read as U+FFFD: 2",)
    nested = json.dumps([None, {"role": "user", "content": "a\ud800b"}])
    (tmp_path / "nested.jsonl").write_text(json.dumps({"messages": nested}))
    loaded = load_rows(str(tmp_path / "nested.jsonl"))
    assert loaded.text == "a\ufffdb" and loaded.notes[0].endswith("U+FFFD: 1")
    chats = load_conversations(write(tmp_path, "b.jsonl", r'{"messages": [{"role": "user", "content": "\ud83d"}]}'))
    assert chats.rows == [[{"role": "user", "content": "\ufffd"}]]
    assert len(chats.notes) == 1
    assert load_rows(write(tmp_path, "c.jsonl", r'{"text": "\ud83d\ude00"}')).notes == ()


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "Hi\nHello"),
        ({"instruction": "Add.", "input": "", "output": "2"}, "Add.\n2"),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, "Add.\n1 1\n2"),
        ({"instruction": "Add.", "context": "1 1", "response": "2"}, "Add.\n1 1\n2"),
        ({"prompt": "Hi", "completion": "Hello"}, "Hi\nHello"),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, "Hi\nHello"),
        ({"question": "Why?", "answer": "So.", "id": 3}, "Why?\nSo."),
        ({"content": "x = 1\n", "path": "a.py"}, "x = 1\n"),
        ({"text": "words", "content": "others"}, "words"),
        ({"text": None, "messages": TALK}, "Hi\nHello"),
        ({"text": ["one", "two"]}, "one\ntwo"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}]}, "Hi"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b", None]}]}, "ab"),
        ({"messages": [*TALK, {"role": "assistant", "content": None, "tool_calls": []}]}, "Hi\nHello"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}, 'add\n{"a": "é"}'),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{}"}]}]}, "add\n{}"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}}]}, "add\n{}"),
        ({"messages": [{"role": "user", "content": "Hi", "tool_calls": 1}]}, "Hi"),
        ({"messages": json.dumps(TALK)}, "Hi\nHello"),
        ({"messages": "[Hi]"}, "[Hi]"),
        ({"text": ["a", None, "b"]}, "a\nb"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q\nA"),
        ({"messages": [None, *TALK, {"role": "tool", "content": "3"}]}, "Hi\nHello\n3"),
        ({"messages": []}, ""),
        ({"messages": None, "text": None}, ""),
    ],
)
def test_text_of_a_record_with_the_field_names_of_common_data_sets(record, text, tmp_path):
    lines = json.dumps(record) + '\n{"text": "end"}\n'
    assert load_rows(write(tmp_path, "a.jsonl", lines)).rows == [text, "end"]


@pytest.mark.parametrize("type", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_parquet_texts_of_any_string_type(type, tmp_path):
    rows = [None, *(f"row {number}" for number in range(MANY))]
    array = pyarrow.array(rows, type)
    for name, column in (("a.Parquet", array), ("b.parquet", array.cast(pyarrow.string()).dictionary_encode())):
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "id": range(MANY + 1)}), tmp_path / name)
        assert load_rows(str(tmp_path / name)).rows == ["", *rows[1:]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": [1, 2]}, 'row 0: field "text" holds a number'),
        ({"text": [b"x"]}, 'row 0: field "text" holds bytes'),
        ({"body": ["x"], "id": [1]}, "row 0: holds neither .*its fields are 'body', 'id'"),
        ({"text": pyarrow.array([], pyarrow.string())}, "holds no text"),
    ],
)
def test_parquet_files_without_text_are_refused_with_their_columns(table, message, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet.*{message}"):
        load_rows(str(tmp_path / "a.parquet"))


def test_parquet_string_that_is_not_utf8_is_refused(tmp_path):
    buffers = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")
    broken = pyarrow.StringArray.from_buffers(1, *buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file .*utf-8"):
        load_rows(str(tmp_path / "a.parquet"))


def test_conversations_have_the_form_that_chat_templates_need(tmp_path):
    records = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}], "name": None}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "system", "value": "Be."}, {"from": "observation", "value": "3"}, None]},
    ]
    loaded = load_conversations(write(tmp_path, "a.JSONL", "\n".join(map(json.dumps, records))))
    assert loaded.rows == [
        TALK[:1],
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        TALK,
        [{"role": "system", "content": "Be."}, {"role": "tool", "content": "3"}],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', "line 1: holds no \"messages\".*its fields are 'text'; leave out --chat"),
        ('{"messages": [{"content": "x"}]}', "line 1: a message has no \"role\"; its fields are 'content'"),
        ('{"messages": "x"}', 'line 1: holds no "messages"'),
        ('{"messages": []}', "holds no conversation"),
    ],
)
def test_records_without_a_conversation_are_refused(line, message, tmp_path):
    with pytest.raises(UserError, match=rf"a\.jsonl.*{message}"):
        load_conversations(write(tmp_path, "a.jsonl", line))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 text .* at byte 3"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["wikitext3", "some/where", "missing.txt", "a.jsonl/b.jsonl", "~nobody/missing.txt"])
def test_unknown_source_is_refused_with_the_known_presets(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.jsonl", "{}")
    with pytest.raises(UserError, match=r"(no such file|cannot be opened as a file).*wikitext2, c4, ptb"):
        load_rows(name)


def test_path_that_is_not_a_text_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.jsonl").mkdir()
    for source, message in (
        (str(tmp_path / "pipe.txt"), r"pipe\.txt: is a pipe or a device; save the text as a file"),
        (str(tmp_path / "folder.jsonl"), r"folder\.jsonl: is a folder; give a \.txt"),
        (".", r"\.: is a folder; give a \.txt"),
        ("x" * 5000, "xxx: cannot be opened as a file .*too long"),
        ("", "'': not a usable file name"),
        ("caf\udce9.txt", r"'caf\\udce9\.txt': not a usable file name"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load_rows(source)
        assert len(str(raised.value)) < 400


def test_file_without_read_permission_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "a.txt", "words")

    def deny(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", deny)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        load_rows(path)
    monkeypatch.setattr("pathlib.Path.stat", deny)
    with pytest.raises(UserError, match=r"a\.txt: cannot be opened as a file"):
        load_rows(path)


def test_segments_concatenate_to_the_text():
    loaded = load_rows(PYTHON_DOCS)
    assert "".join(loaded.segments()) == loaded.text == "\n\n".join(loaded.rows)


def test_unknown_join_is_refused():
    with pytest.raises(UserError, match="join 'lines': not one of auto, rows, text"):
        load_rows(PYTHON_DOCS, join="lines")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_without_a_hub_names_the_alternatives(name):
    with pytest.raises(UserError, match=rf"{name}: cannot be read from the Hugging Face hub .* local .*python-docs"):
        load_rows(name)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_reads_its_column_of_the_requested_split(name, monkeypatch):
    import datasets

    requested = {}

    def load_dataset(loader, *, data_files, split, streaming):
        requested.update(loader=loader, data_files=data_files, split=split, streaming=streaming)
        return ({PRESETS[name].column: f"row {number}", "other": 1} for number in range(2000))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    preset = PRESETS[name]
    loaded = load_rows(name, split="validation")
    assert loaded.rows[1] == "row 1"
    assert len(loaded.rows) == (preset.max_rows or 2000)
    assert loaded.text.startswith(f"row 0{preset.joiner}row 1")
    assert requested == {
        "loader": preset.loader,
        "data_files": preset.files["validation"],
        "split": "train",
        "streaming": preset.max_rows is not None,
    }
    assert set(preset.files) == {"train", "validation", "test"}
    with pytest.raises(UserError, match="has no split 'dev'; its splits are train, validation, test"):
        load_rows(name, split="dev")


def test_python_docs_need_no_network():
    assert len(load_rows(PYTHON_DOCS).text) > 200_000


def test_lines_of_a_pipe_are_read_once():
    """`--prompts <(command)` is such a pipe."""
    reader, writer = os.pipe()
    os.write(writer, "\ufeffone\ntwo\n".encode())
    os.close(writer)
    assert list(text_lines(Path(f"/dev/fd/{reader}"))) == ["one\n", "two\n"]
    os.close(reader)
