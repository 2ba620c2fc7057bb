"""What travels with a job, and what stays: caches, runs, weights, and credentials above all."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from calibprune.errors import UserError
from jobs import packing
from jobs.packing import CONFIG, source_tree, write_package

HERE = Path(__file__).parents[2]
SECRETS = {
    ".env": "PASSWORD=planted",
    "configs/.env.production": "planted",
    "deploy/tls.pem": "planted",
    "server.key": "planted",
    "keys/id_rsa": "planted",
    "keys/id_ed25519.bak": "planted",
    ".netrc": "machine x password planted",
    ".aws/credentials": "planted",
    "gcp/credentials.json": "{}",
    "gcp/my-service-account.json": "{}",
    "gcp/client_secret_123.json": "{}",
    ".ray/auth_token": "planted",
    ".kube/config": "planted",
    "sub/.git-credentials": "https://me:planted@host",
    "innocent.json": '{"private_key": "-----BEGIN' + ' PRIVATE KEY-----planted"}',
    "innocent.txt": "-----BEGIN RSA PRIVATE" + " KEY-----\nplanted",
    "innocent.yaml": "key: " + "AKIA" + "ABCDEFGHIJKLMNOP",
    "innocent.sh": "export HF_TOKEN=" + "hf_" + "a" * 34,
    "innocent.ini": "aws_secret_access_key = " + "planted1/" * 5,
    "upper.sh": "export AWS_SECRET_ACCESS_KEY=" + "planted/" * 5,
    "upper.yaml": 'AWS_SECRET_ACCESS_KEY: "' + "planted1/" * 5 + '"',
    "upper.py": 'os.environ["AWS_SECRET_ACCESS_KEY"] = "' + "planted1/" * 5 + '"',
    "camel.yaml": "secretAccessKey: " + "planted1/" * 5,
    "google.js": "'AI" + "za" + "S" * 35 + "'",
    "gitlab.txt": "gl" + "pat-" + "a" * 20,
    "short-hub.txt": "h" + "f_" + "a" * 24,
    "openai.txt": "s" + "k-" + "a" * 32,
    "address.txt": "https://me" + ":pw@host",
    "wandb.sh": "WANDB_API_KEY=" + "a1" * 20,
    "ray.sh": "RAY_AUTH_TOKEN=" + "ab" * 32,
    "mlflow.sh": "MLFLOW_TRACKING_PASSWORD=" + "planted" * 2,
    "walrus.go": 'password := "planted2planted2"',
    "words.toml": "password = " + '"planted2planted2"',
    "hub/token": "planted",
    "token.txt": "planted",
    "hf_token": "planted",
    "gcp-key.json": "planted",
    "keys/ID_RSA": "planted",
}
NO_SECRETS = """
export HF_TOKEN=$HF_TOKEN WANDB_API_KEY=${KEY} RAY_AUTH_TOKEN=$(cat token)
API_KEY=<your key> RAY_AUTH_TOKEN_PATH=/run/secrets/ray_token_1 AWS_SECRET_ACCESS_KEY=your-key-0123
token = tokenizer2.bos_token_id; access_key=os.environ["AWS_SECRET_ACCESS_KEY"]
max_tokens: 2048, token_ids=[1, 2], eos_token: "<|end_of_text|>", password: str, signature = inspect.signature(f)
--secret RAY_AUTH_TOKEN=... git@github.com:org/name https://example.com/a?page=1
tokenspeed-triton==3.9.10.post20261028 tokenizer-of>=0.1 token_mask=attention_mask_4d token_budget: 1_000_000_000
"transformer.token_embedding.weight": "model-00001-of-00002.safetensors"
"""
STAYS = [
    ".venv/lib/module.py",
    "venv/lib/module.py",
    "calibprune/__pycache__/run.pyc",
    ".pytest_cache/README.md",
    ".cache/model/config.json",
    "runs/demo/run.json",
    "models/tiny/model.safetensors",
    "models/tiny/pytorch_model.bin",
    "results/a/run.json",
    "results/a/report/index.html",
    "build/lib/calibprune/stage.py",
    "calibprune.egg-info/PKG-INFO",
]
TRAVELS = [
    "data/prompts.jsonl",
    "models/tiny/config.json",
    "configs/my.yaml",
    "notes about .env.md",
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source, and all sorts of other files."""
    for name in source_tree(HERE).files:  # type: ignore[union-attr]
        if name.split("/")[0] in ("calibprune", "cluster", "jobs", "configs"):
            write(tmp_path / name, (HERE / name).read_bytes())
    for name, content in SECRETS.items():
        write(tmp_path / name, content.encode())
    for name in (*STAYS, *TRAVELS):
        write(
            tmp_path / name,
            b'private_key = aws_secret_access_key = os.environ["KEY"]' + NO_SECRETS.encode(),
        )
    return tmp_path


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def packed(folder: Path, target: Path) -> dict[str, bytes]:
    write_package(target, source_tree(folder), "output: /x\n")
    with zipfile.ZipFile(target) as package:
        return {name: package.read(name) for name in package.namelist()}


@pytest.mark.parametrize("with_git", [False, True])
def test_source_travels_and_credentials_caches_and_outputs_do_not(tree, tmp_path_factory, with_git):
    if with_git:  # whoever has committed a credential does not want it to travel either
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
        subprocess.run(["git", "add", "-f", *SECRETS], cwd=tree, check=True)
    contents = packed(tree, tmp_path_factory.mktemp("zip") / "package.zip")
    assert contents[CONFIG] == b"output: /x\n"
    assert contents["jobs/__main__.py"] == (HERE / "jobs" / "__main__.py").read_bytes()
    assert contents.keys() >= {"calibprune/presets/bos.yaml", *TRAVELS}
    assert not contents.keys() & {*SECRETS, *STAYS}
    assert not any(b"planted" in content for content in contents.values())
    assert not any(name.startswith((".git/", ".venv")) for name in contents)
    assert set(source_tree(tree).withheld) == set(SECRETS)  # type: ignore[union-attr]


def test_rays_own_command_leaves_the_same_names_out(tree, tmp_path_factory):
    names = [line for line in (HERE / ".rayignore").read_text().splitlines() if line[0] != "#"]
    assert names == packing.NOT_SOURCE.split() + packing.CREDENTIALS.split()
    shutil.copy(HERE / ".rayignore", tree)
    target = tmp_path_factory.mktemp("zip") / "package.zip"
    create_package(str(tree), target, include_gitignore=True)
    with zipfile.ZipFile(target) as package:
        sent = set(package.namelist())
    assert {"jobs/__main__.py", *TRAVELS} <= sent
    by_name = {name for name in SECRETS if packing._credentials.match_file(name)}
    assert len(by_name) > 15 and not sent & by_name
    assert not sent & {name for name in STAYS if not name.startswith("results/")}
    withheld = source_tree(tree).withheld  # type: ignore[union-attr]
    assert set(withheld) == set(SECRETS)


def test_all_of_the_project_that_a_job_needs_travels():
    found = source_tree(HERE)
    assert found is not None
    assert [name for name in found.withheld if not name.startswith("tests/")] == []


@pytest.mark.parametrize("with_git", [False, True])
def test_what_is_ignored_stays(tree, tmp_path, with_git):
    write(tree / ".gitignore", b"scratch/\n*.log\n")
    write(tree / ".rayignore", b"/data\n")
    for name in ("scratch/a.py", "x.log", "sub/y.log"):
        write(tree / name, b"x")
    if with_git:
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    files = source_tree(tree).files  # type: ignore[union-attr]
    assert "configs/my.yaml" in files
    assert not {"scratch/a.py", "x.log", "sub/y.log", "data/prompts.jsonl"} & set(files)


def test_links_that_lead_out_of_the_tree_or_to_a_credential_stay(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "private.txt"
    outside.write_text("planted")
    (tree / "link.txt").symlink_to(outside)
    (tree / "folder").symlink_to(outside.parent)
    (tree / "config.txt").symlink_to(tree / "server.key")
    assert not {"link.txt", "folder/private.txt", "config.txt"} & set(source_tree(tree).files)  # type: ignore[union-attr]


def test_equal_trees_give_equal_packages(tree, tmp_path_factory):
    first, second = (tmp_path_factory.mktemp("zip") / "package.zip" for _ in range(2))
    write_package(first, source_tree(tree), "a: 1")
    (tree / "jobs" / "__main__.py").touch()
    write_package(second, source_tree(tree), "a: 1")
    assert first.read_bytes() == second.read_bytes()


def test_too_much_is_refused_with_the_largest_files_named(tree, monkeypatch):
    monkeypatch.setattr(packing, "MOST_BYTES", 3 << 20)
    write(tree / "data" / "large.jsonl", b"x" * (4 << 20))
    write(tree / "data" / "ignored.safetensors", b"x" * (4 << 20))
    with pytest.raises(UserError, match=r"data/large\.jsonl \(4 MB\)") as refused:
        source_tree(tree)
    assert "ignored.safetensors" not in str(refused.value) and ".rayignore" in str(refused.value)


@pytest.mark.parametrize("before", [packing.SEARCHED_AT_ONCE - 29, 9 << 17])
def test_a_credential_deep_in_a_large_file_is_found(tmp_path, before):
    """The first one lies across the border of two pieces."""
    for name in ("jobs/__main__.py", "calibprune/stage.py"):
        write(tmp_path / name, b"")
    line = b'"output": "loss 0.5 of 2048 tokens, perplexity 12.75",\n'
    filling = line * ((5 << 18) // len(line))
    secret = b'\n"source": "login(token=' + b"h" + b"f_" + b"a1" * 17 + b')",\n'
    write(tmp_path / "plain.ipynb", filling)
    write(tmp_path / "planted.ipynb", filling[:before] + secret + filling[before:])
    found = source_tree(tmp_path)
    assert found is not None
    assert found.withheld == ("planted.ipynb",) and "plain.ipynb" in found.files


def test_elsewhere_the_configuration_travels_alone(tmp_path):
    write(tmp_path / "jobs" / "mine.py", b"x")
    assert source_tree(tmp_path) is None
    assert list(packed(tmp_path, tmp_path / "package.zip")) == [CONFIG]


def test_a_folder_travels_only_with_all_that_is_in_it(tree):
    found = source_tree(tree)
    assert found is not None
    assert (
        found.holds("data") and found.holds("configs/my.yaml") and found.holds(str(tree / "data"))
    )
    assert not found.holds("models/tiny") and not found.holds("nowhere")
    shutil.rmtree(tree / "data")
    assert not found.holds("data")
