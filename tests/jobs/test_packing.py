"""Files that travel with a job, and files that stay: those that git ignores, runs, and files named like credentials."""

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
    "hub/token": "planted",
    "token.txt": "planted",
    "hf_token": "planted",
    "gcp-key.json": "planted",
    "keys/ID_RSA": "planted",
}
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
    """Makes a copy of the source with all sorts of other files."""
    for name in source_tree(HERE).files:  # type: ignore[union-attr]
        if name.split("/")[0] in ("calibprune", "cluster", "jobs", "configs"):
            write(tmp_path / name, (HERE / name).read_bytes())
    for name, content in SECRETS.items():
        write(tmp_path / name, content.encode())
    for name in (*STAYS, *TRAVELS):
        write(tmp_path / name, b"x")
    shutil.copy(HERE / ".gitignore", tmp_path)
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
    if with_git:  # a credential that was committed must not travel either
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
    assert names == packing.CREDENTIALS.split()
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
    monkeypatch.setattr(packing, "MAX_BYTES", 3 << 20)
    write(tree / "data" / "large.jsonl", b"x" * (4 << 20))
    write(tree / "data" / "ignored.safetensors", b"x" * (4 << 20))
    with pytest.raises(UserError, match=r"data/large\.jsonl \(4 MB\)") as refused:
        source_tree(tree)
    assert "ignored.safetensors" not in str(refused.value) and ".rayignore" in str(refused.value)


def test_a_tree_that_an_outer_one_ignores_travels_whole(tree):
    """In such a tree git lists nothing."""
    outer = tree / "work"
    outer.mkdir()
    for name in ("calibprune", "jobs"):
        shutil.move(tree / name, outer / name)
    write(tree / ".gitignore", b"/work/\n")
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    found = source_tree(outer)
    assert found is not None and "jobs/packing.py" in found.files


def test_local_edits_travel_and_what_is_deleted_does_not(tree):
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    write(tree / "configs" / "new.yaml", b"output: /new\n")
    write(tree / "configs" / "my.yaml", b"edited")
    (tree / "data" / "prompts.jsonl").unlink()
    found = source_tree(tree)
    assert found is not None
    assert "configs/new.yaml" in found.files and "data/prompts.jsonl" not in found.files
    assert packed(tree, tree.parent / "edited.zip")["configs/my.yaml"] == b"edited"


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
