"""Untrusted run folders, checkpoints and pools are data: nothing in them is executed or leads out of them."""

import json
import math
import os
import pickle
import shutil
import struct
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibprune import storage
from calibprune.calibration.pool import describe_pool, read_pool
from calibprune.calibration.prefix_sources import candidates
from calibprune.calibration.texts import documents
from calibprune.checkpoint import Checkpoint, side_files
from calibprune.config.generate import PromptPrefixes
from calibprune.config.model import ModelSettings
from calibprune.errors import CorruptionError, UserError
from calibprune.model import build_skeleton, load_tokenizer
from calibprune.publish import publish
from calibprune.stage import Stage
from tests.tiny import byte_tokenizer

CODE = "from pathlib import Path\nPath({!r}).write_text('ran')\n"


def told(error) -> str:
    """Returns the message, which has to be one line."""
    text = str(error.value)
    assert "\n" not in text and "\x1b" not in text
    return text


@pytest.fixture
def outside(tmp_path):
    """Makes a file that no run folder may reach."""
    path = tmp_path / "outside" / "secret-aaa-00000000.parquet"
    path.parent.mkdir()
    path.write_bytes(b"secret")
    return path


@pytest.fixture
def stage(tmp_path):
    """A finished stage of one unit."""
    stage = Stage(str(tmp_path / "run" / "generate"))
    stage.plan({"a": 1}, ["aaa"])
    stage.commit("aaa", stage.put("aaa", b"content", "parquet", "data", "part"), {"rows": 1})
    stage.finish()
    return stage


def replace(path, **changes):
    """Changes the record in a done record's file, or in a manifest."""
    content = json.loads(path.read_text())
    target = content["records"][0] if "records" in content else content
    target.update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "../../outside/secret-aaa-00000000.parquet"},
        {"file": "/etc/secret-aaa-00000000.parquet"},
        {"file": "http://127.0.0.1:9/x-aaa-0.parquet"},
        {"file": "data/../../secret-aaa-00000000.parquet"},
        {"file": "data/..\\secret-aaa-0.parquet"},
        {"file": "data/part-aaa-0.parquet\n"},
        {"file": "data/part-bbb-00000000.parquet"},
        {"file": "data/part-aaa-0.parquet", "sha256": None},
        {"file": None},
        {"file": ["data/part-aaa-0.parquet"]},
        {"unit": "../aaa"},
        {"unit": "a/b"},
        {"unit": ""},
        {"bytes": -1},
        {"bytes": 10**400},
        {"bytes": "many"},
        {"sha256": "0" * 63},
        {"facts": [1]},
        {"finished_at": "now"},
        {"finished_at": math.inf},
        {"__class__": "os.system"},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_cannot_lead_out_of_its_stage(stage, outside, changes):
    for path in ("_done/aaa.json", "manifest.json"):
        replace(Path(stage.url, path), **changes)
    with pytest.raises(CorruptionError, match="damaged") as error:
        stage.done()
    told(error)
    with pytest.raises(CorruptionError, match=r"manifest\.json is damaged") as error:
        [stage.read(record) for record in stage.records()]
    told(error)
    with pytest.raises(CorruptionError):
        publish(stage.url, str(outside.parent.parent / "target"))
    assert not (outside.parent.parent / "target").exists()


@pytest.mark.parametrize("name", ["_plan.json", "manifest.json", "_done/aaa.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"3", b'"text"', b"\xff\xfe", b"{" * 200_000, b"[" * 200_000, b'{"records": 3}',
        b'{"units": [1], "identity": {}}', b'{"units": ["../x"], "identity": {}, "created_at": 1}',
        b'{"identity": [], "units": [], "created_at": 0}', b"1" * 10_000,
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_damaged_files_of_a_stage_are_told(stage, name, content):
    Path(stage.url, name).write_bytes(content)
    reading = {
        "_plan.json": stage.read_plan,
        "manifest.json": stage.records,
        "_done/aaa.json": stage.done,
    }
    with pytest.raises(CorruptionError, match="damaged") as error:
        reading[name]()
    assert len(told(error)) < 600


def test_a_link_is_not_published(stage, outside, tmp_path):
    Path(stage.url, "data", "notes.txt").symlink_to(outside)
    with pytest.raises(UserError, match=r"notes\.txt is a link"):
        publish(stage.url, str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()


@pytest.fixture
def model(tmp_path, tiny_llama):
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def write_shard(path, header):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + b"\0" * 64)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../../etc/passwd.safetensors"}, "which is not there"),
        ({"a": "/etc/passwd.safetensors"}, "which is not there"),
        ({"a": "http://127.0.0.1:9/a.safetensors"}, "which is not there"),
        ({"a": "pytorch_model.bin"}, "opens no pickle"),
        ({"a": "weights.pt"}, "opens no pickle"),
        ({"a": 3}, "damaged"),
        ({"a": ["model.safetensors"]}, "damaged"),
        ([], "damaged"),
        ({}, "damaged"),
        (None, "damaged"),
    ],
)
def test_an_index_names_safetensors_of_its_folder_only(model, weight_map, message):
    (model / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message) as error:
        Checkpoint(str(model))
    told(error)


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 200_000, b'{"weight_map": ', b"\xff"])
def test_a_damaged_index_is_told(model, content):
    (model / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CorruptionError, match="damaged"):
        Checkpoint(str(model))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "adapter_model.bin"]
)
def test_pickled_weights_are_refused(tmp_path, tiny_llama, name):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="opens no pickle") as error:
        Checkpoint(str(tmp_path))
    told(error)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{", b"[" * 100_000, {"a": 3}, {"a": {}}, {"a": ENTRY | {"data_offsets": [8, 0]}},
        {"a": ENTRY | {"data_offsets": [-8, 0]}}, {"a": ENTRY | {"data_offsets": [0, 1 << 60]}},
        {"a": ENTRY | {"shape": [1 << 60], "data_offsets": [0, 8]}}, {"a": ENTRY | {"shape": [-2]}},
        {"a": ENTRY | {"shape": "xx"}}, {"a": ENTRY | {"data_offsets": ["a", "b"]}}, {"a": ENTRY | {"dtype": []}},
        {"a": ENTRY | {"data_offsets": [0, 8, 16]}},
    ],
    ids=lambda header: str(header)[:50],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(tmp_path, tiny_llama, header):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    write_shard(tmp_path / "model.safetensors", header)
    with pytest.raises(UserError) as error:
        Checkpoint(str(tmp_path))
    assert "model.safetensors" in told(error)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plant_code(model, mark):
    """Puts code wherever a library may look for it; the code leaves a mark if it runs."""
    for name in (
        "evil.py",
        "modeling_evil.py",
        "tokenization_evil.py",
        "conftest.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (model / name).write_text(CODE.format(str(mark)) + "class Evil: pass\n")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE.format(str(mark)))
    for name in (
        "tokenizer.pkl",
        "vocab.pkl",
        "training_args.bin",
        "pytorch_model.bin",
        "adapter_model.bin",
    ):
        (model / name).write_bytes(pickle.dumps(Mark(str(mark))))
    (model / "adapter_config.json").write_text(
        json.dumps(
            {
                "base_model_name_or_path": "evil/base",
                "auto_mapping": {"base_model_class": "evil.Evil"},
            }
        )
    )


class Mark:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


AUTO_MAP = {
    "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}  # fmt: skip


def test_a_known_model_with_code_of_its_own_runs_none_of_it(model, tmp_path):
    plant_code(model, tmp_path / "mark")
    change(
        model / "config.json",
        auto_map=AUTO_MAP,
        _attn_implementation="evil/kernel",
        vision_config={"auto_map": AUTO_MAP},
    )
    change(model / "tokenizer_config.json", auto_map=AUTO_MAP)
    skeleton = build_skeleton(ModelSettings(path=str(model)))
    assert type(skeleton.model).__module__.startswith("transformers.")
    assert skeleton.model.config._attn_implementation == "sdpa"
    assert load_tokenizer(str(model))("ab").input_ids
    assert not (tmp_path / "mark").exists()


def test_an_unknown_model_that_needs_its_own_code_is_refused(model, tmp_path):
    plant_code(model, tmp_path / "mark")
    change(
        model / "config.json",
        auto_map=AUTO_MAP,
        model_type="evil",
        architectures=["EvilForCausalLM"],
    )
    with pytest.raises(
        UserError, match=r"not run; set model\.trust_remote_code=true if you have read"
    ) as error:
        build_skeleton(ModelSettings(path=str(model)))
    told(error)
    change(model / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Evil")
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot read the tokenizer") as error:
        load_tokenizer(str(model))
    told(error)
    assert not (tmp_path / "mark").exists()


def test_code_runs_where_it_is_trusted(model, tmp_path, monkeypatch):
    """Otherwise the tests above would pass for the wrong reason."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    plant_code(model, tmp_path / "mark")
    change(
        model / "config.json",
        auto_map=AUTO_MAP,
        model_type="evil",
        architectures=["EvilForCausalLM"],
    )
    with pytest.raises(UserError):
        build_skeleton(ModelSettings(path=str(model), trust_remote_code=True))
    assert (tmp_path / "mark").exists()


def test_trusted_code_in_a_store_is_run_from_there(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change(
        model / "config.json", auto_map=names, model_type="own", architectures=["OwnForCausalLM"]
    )
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    store = fsspec.filesystem("memory")
    store.put(str(model), "/own", recursive=True)
    try:
        built = build_skeleton(ModelSettings(path="memory://own", trust_remote_code=True))
    finally:
        store.rm("/own", recursive=True)
    assert type(built.model).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": "three"}, {"num_hidden_layers": None},
        {"num_hidden_layers": -1}, {"architectures": "../x"}, {"model_type": ["llama"]}, {"hidden_size": "x"},
        {"model_type": "../../evil"}, {"rope_scaling": {"rope_type": "__import__"}}, 
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(model, changes):
    change(model / "config.json", **changes)
    with pytest.raises(UserError) as error:
        build_skeleton(ModelSettings(path=str(model)))
    told(error)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 200_000])
def test_damaged_side_files_are_told(model, content):
    (model / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="cannot read the tokenizer") as error:
        load_tokenizer(str(model))
    told(error)
    (model / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="cannot use the model") as error:
        build_skeleton(ModelSettings(path=str(model)))
    told(error)


def test_a_link_out_of_a_model_is_not_copied(model, tmp_path):
    (tmp_path / "credentials").write_text("aws_secret_access_key=hunter22")
    (model / "README.txt").symlink_to(tmp_path / "credentials")
    assert "README.txt" not in side_files(str(model)) and "config.json" in side_files(str(model))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(tmp_path, template):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template.replace("MARK", str(tmp_path / "mark"))
    settings = PromptPrefixes(type="prompts", path=str(tmp_path / "prompts.jsonl"))
    with pytest.raises(UserError, match="refuses a prompt") as error:
        next(candidates(settings, tokenizer))
    told(error)
    assert not (tmp_path / "mark").exists()


def pickled_parquet(path, mark):
    """Makes a parquet file whose columns and metadata contain pickles, as extension types of pyarrow once did."""
    evil = pickle.dumps(Mark(str(mark)))
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": evil,
    }
    fields = [
        pa.field("text", pa.string(), metadata=extension),
        pa.field("token_ids", pa.list_(pa.int32()), metadata=extension),
    ]
    schema = pa.schema(fields, metadata={b"pandas": evil, b"huggingface": evil, b"evil": evil})
    pq.write_table(pa.table([["hello"], [[1, 2, 3]]], schema=schema), path)


def test_pickles_in_parquet_metadata_are_not_opened(tmp_path):
    (tmp_path / "pool").mkdir()
    pickled_parquet(tmp_path / "pool" / "a.parquet", tmp_path / "mark")
    assert list(documents(str(tmp_path / "pool"))) == ["hello"]
    pool = read_pool(str(tmp_path / "pool"))
    assert pool.token_ids.tolist() == [[1, 2, 3]] and pool.generated is None
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "column",
    [["a"], [[["x"]]], [[1.5, 2.5]], [None], [[1, None]], [{"a": 1}], [[]], [b"\x80\x04"]],
    ids=str,
)
def test_a_pool_of_something_else_is_refused(tmp_path, column):
    pq.write_table(pa.table({"token_ids": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        read_pool(str(tmp_path))
    told(error)


def test_a_pool_that_is_no_parquet_is_refused(tmp_path):
    for content in (
        b"",
        b"PAR1" + b"\xff" * 64 + b"PAR1",
        pickle.dumps(Mark(str(tmp_path / "mark"))),
    ):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read") as error:
            read_pool(str(tmp_path))
        told(error)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"sequences": "9", "tokens": 9},
        {"sequences": 0, "tokens": 0},
        {"sequences": 10**30, "tokens": 1},
    ],
)
def test_a_pool_whose_records_lie_is_told(tmp_path, facts):
    stage = Stage(str(tmp_path / "curate"))
    stage.plan({}, ["pool-00000"])
    stage.commit("pool-00000", stage.put("pool-00000", b"x", "parquet", "data", "part"), facts)
    stage.finish()
    with pytest.raises(CorruptionError, match="the size of the pool"):
        describe_pool(stage.url)


def test_a_format_of_the_datasets_library_is_no_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Mark(str(tmp_path / "mark"))))
    with pytest.raises(UserError, match="not a dataset"):
        next(documents("pandas"))
    assert not (tmp_path / "mark").exists()


def test_a_dataset_with_a_script_does_not_run_it(tmp_path):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text(CODE.format(str(tmp_path / "mark")))
    with pytest.raises(UserError, match="no text in the folder"):
        next(documents(str(folder)))
    assert not (tmp_path / "mark").exists()


def test_local_files_are_no_wider_than_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        storage.write(str(tmp_path / "a" / "file"), b"x")
        storage.create(str(tmp_path / "a" / "other"), b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o600}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"file", "other"}


def test_temporary_copies_of_side_files_are_private_and_go(tmp_path, model, monkeypatch):
    from calibprune.checkpoint import local_side_files

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    for path in model.iterdir():
        storage.write(f"memory://side/{path.name}", path.read_bytes())
    with local_side_files("memory://side") as folder:
        assert (
            Path(folder).parent == tmp_path / "scratch"
            and Path(folder).stat().st_mode & 0o777 == 0o700
        )
        assert Path(folder, "config.json").exists() and not list(Path(folder).glob("*.safetensors"))
    assert not list((tmp_path / "scratch").iterdir())
