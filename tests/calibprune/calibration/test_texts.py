"""Every kind of text source, and the one-line errors of what is not one."""

import gzip
import json
import os
import subprocess
import sys
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from calibprune.calibration.texts import documents, prompts, running_text
from calibprune.config.evaluate import HeldOutText
from calibprune.errors import UserError
from tests.servers import web_server


def write_parquet(path, texts, column="text"):
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_text_file_has_a_document_per_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("first, naïve\r\n\n  \nsecond".encode())
    assert list(documents(str(tmp_path / "a.txt"))) == ["first, naïve", "second"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    raw = jsonl([{"content": "one"}, {"content": None}, {"content": ""}, {"content": "two\nlines"}])
    compress = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(compress(raw.encode()))
    assert list(documents(str(tmp_path / name), column="content")) == ["one", "two\nlines"]


def test_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None, "two"])
    assert list(documents(str(tmp_path / "a.parquet"))) == ["one", "two"]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write_parquet(tmp_path / "b.parquet", ["third"])
    (tmp_path / "a.txt").write_text("first\nsecond\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.jsonl").write_text(jsonl([{"text": "fourth"}]))
    (tmp_path / "README.md").write_text("not read")
    (tmp_path / "_plan.json").write_text("not read")
    assert list(documents(str(tmp_path))) == ["first", "second", "third", "fourth"]


def test_a_url():
    with fsspec.open("memory://texts/a.txt", "w") as file:
        file.write("far away\n")
    assert list(documents("memory://texts/a.txt")) == ["far away"]
    assert list(documents("memory://texts")) == ["far away"]


def test_documents_are_streamed(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl([{"text": "good"}]) + "not json\n")
    stream = documents(str(tmp_path / "a.jsonl"))
    assert next(stream) == "good"
    with pytest.raises(UserError, match=r"line 2 of .*a\.jsonl is not a JSON object"):
        next(stream)


def test_python_docs():
    topics = list(documents("python-docs"))
    assert len(topics) > 50
    assert topics == list(documents("python-docs"))
    assert sum(map(len, topics)) > 300_000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/missing.txt", "no file or folder at .*missing.txt"),
        ("./missing/folder", "no file or folder at ./missing/folder"),
        ("{}", "no text in the folder .*: .txt, .jsonl"),
        ("{}/note.pdf", "note.pdf is of an unknown kind: .txt, .jsonl"),
        ("nonsense://a/b.txt", "cannot open nonsense://a/b.txt: .*nonsense"),
    ],
)
def test_a_path_that_is_no_text_is_refused_at_once(tmp_path, path, message):
    (tmp_path / "note.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=message) as error:
        documents(path.format(tmp_path))
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """The file system refuses, since root may read every file."""

    class Closed(LocalFileSystem):
        def open(self, path, *args, **kwargs):
            raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("calibprune.storage.resolve", lambda url: (Closed(), url))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"access denied: cannot read .*a\.txt"):
        next(documents(str(tmp_path / "a.txt")))


@pytest.mark.parametrize("path", ["org/name", "wikitext", "hf://datasets/org/name"])
def test_a_dataset_id_without_the_hub(path):
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(UserError, match=rf"no text at {path}: .*hub cannot be reached"):
        documents(path)


def ask_hub(endpoint):
    """Opens a dataset of the hub in a process of its own; returns what that prints on both streams."""
    reading = (
        "from calibprune.calibration.texts import documents\n"
        "try: documents('org/name')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", reading], stdout=-1, stderr=subprocess.STDOUT, text=True, check=True,
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    return done.stdout.strip()


def test_a_hub_that_cannot_be_reached_is_named_in_one_line():
    """The hub's libraries would retry for half a minute and log every attempt."""
    start = time.monotonic()
    assert ask_hub("http://127.0.0.1:9") == (
        "StoreUnavailable no text at org/name: no such file or folder here, and the Hugging Face hub cannot be "
        "reached for a dataset of that name"
    )
    assert time.monotonic() - start < 20


def test_a_dataset_that_the_hub_does_not_have(tmp_path):
    with web_server(tmp_path) as endpoint:
        told = ask_hub(endpoint)
    assert told.startswith(
        "UserError no text at org/name: no such file or folder here, and no such"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/wiki", "no file or folder at data/wiki, though .*: .* hf://datasets/data/wiki$"),
        ("org/texts.jsonl", "no file or folder at org/texts.jsonl$"),
        ("texts.txt.gz", "no file or folder at texts.txt.gz$"),
        ("my texts", "no file or folder at my texts$"),
        ("a/b/c", "no file or folder at a/b/c$"),
    ],
)
def test_what_can_only_be_a_local_path_is_not_asked_of_the_hub(
    tmp_path, monkeypatch, path, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("calibprune.calibration.texts._hub_rows", lambda *_: pytest.fail("asked"))
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=message):
        documents(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "a.txt holds no text"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
        ("a.jsonl", b'{"body": "x", "id": 1}', 'no column "text" in line 1 of .*: it has body, id'),
        ("a.jsonl", b'{"text": 3}', 'column "text" of line 1 of .* holds int, not text'),
        ("a.json", b'[{"text": "x"}]', "line 1 of .* is not a JSON object"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\\ud800b"}',
            r"line 2 of .*: \\ud800 is half of a character",
        ),
        ("a.jsonl.gz", b"nonsense", "a.jsonl.gz is not a complete gzip file"),
        (
            "a.txt.gz",
            gzip.compress(b"text\n" * 9999, mtime=0)[:-20],
            "a.txt.gz is not a complete gzip file",
        ),
        ("a.parquet", b"nonsense", "a.parquet is not a parquet file"),
    ],
)
def test_a_file_with_other_content_says_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(documents(str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_a_missing_parquet_column_names_those_there(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"], column="body")
    with pytest.raises(UserError, match=r'no column "text" in .*a.parquet: it has body'):
        list(documents(str(tmp_path / "a.parquet")))


def test_running_text_takes_a_text_file_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" = Title = \n\none\ntwo\n")
    text = HeldOutText(name="own", path=str(tmp_path / "a.txt"))
    assert running_text(text) == " = Title = \n\none\ntwo\n"


def test_running_text_joins_documents_and_keeps_blank_ones(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", "", "two", "three"])
    text = HeldOutText(name="own", path=str(tmp_path / "a.parquet"), separator="|")
    assert running_text(text) == "one||two|three"


def test_running_text_without_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["", None])
    with pytest.raises(UserError, match="holds no text"):
        running_text(HeldOutText(name="own", path=str(tmp_path / "a.parquet")))


def test_prompts_are_texts_or_chat_messages(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "one"}, {"prompt": " "}, {"prompt": chat}, {"prompt": []}, {"prompt": None}]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    assert list(prompts(str(tmp_path / "a.jsonl"))) == ["one", chat]
    with pytest.raises(UserError, match=r'column "prompt" of line 3 .* holds list, not text'):
        list(documents(str(tmp_path / "a.jsonl"), column="prompt"))
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert list(prompts(str(tmp_path / "b.txt"))) == ["one", "two"]


@pytest.mark.parametrize("cell", [["a", "b"], [{"role": "user"}], 3])
def test_what_is_no_prompt_is_refused(tmp_path, cell):
    (tmp_path / "a.jsonl").write_text(jsonl([{"prompt": cell}]))
    with pytest.raises(UserError, match=r'column "prompt" of line 1 of .* holds'):
        list(prompts(str(tmp_path / "a.jsonl")))
