"""The package of a submitted job: the source tree that it is submitted from, and its configuration, in one zip file.

The tree's files are those that git tracks and those that it neither tracks nor ignores, so that local edits are sent
too. Files whose names are typical of credentials are left out and reported; contents are not searched. A cluster
stores the package and unpacks it on every node, where others can read it.
"""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from calibprune.errors import UserError

CONFIG = "calibprune-submitted.yaml"
"""Name of the configuration in the package."""
MAX_BYTES = 100 << 20
"""Maximum size of a package's files together, since the package passes through the cluster's head."""
MARKS = ("jobs/__main__.py", "calibprune/stage.py")
"""Files that identify a checkout of calibprune."""

CREDENTIALS = """
    .env .env.* *.env .envrc *.pem *.key *.p12 *.pfx *.jks *.kdbx *.ppk *.keytab id_rsa* id_dsa* id_ecdsa* id_ed25519*
    .netrc _netrc .pgpass .pypirc .npmrc .htpasswd .git-credentials .boto .s3cfg .dockercfg rclone.conf
    credentials credentials.* *credentials*.json client_secret*.json *service[-_]account*.json
    *[-_]key.json adc.json secret.* secrets.* *.secret kubeconfig* *.tfstate*
    token token.txt *[-_]token *[-_]token.txt *.token
    .aws .azure .config .docker .gcloud .gnupg .huggingface .kube .ray .ssh
"""
"""Names of files and folders that hold credentials, in the patterns of .gitignore; .rayignore lists the same."""
_credentials = GitIgnoreSpec.from_lines(CREDENTIALS.split())


@dataclass(frozen=True)
class Tree:
    """The files of a source tree that are sent."""

    root: Path
    files: tuple[str, ...] = ()
    """Paths relative to the root, sorted."""
    withheld: tuple[str, ...] = ()
    """Files that are not sent because their names are typical of credentials."""

    def holds(self, path: str) -> bool:
        """Returns whether a file, or everything in a folder, is sent; the path is relative to the root."""
        full = (self.root / path).resolve()
        files = full.rglob("*") if full.is_dir() else [full]
        inside = [file for file in files if file.is_file()]
        known = {(self.root / file).resolve() for file in self.files}
        return bool(inside) and known.issuperset(inside)


def source_tree(folder: Path) -> Tree | None:
    """Finds the files of a checkout of calibprune to send; None where the folder is no such checkout.

    Raises UserError, naming the largest files, where they are too large together.
    """
    root = folder.resolve()
    if not all((root / name).is_file() for name in MARKS):
        return None
    files, withheld = [], []
    for name in _candidates(root):
        path = root / name
        if name == CONFIG or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):  # a link that leads out of the tree
            continue
        (withheld if _named_as_credential(root, name) else files).append(name)
    files = _without_runs(files)
    sizes = {name: (root / name).stat().st_size for name in files}
    if sum(sizes.values()) > MAX_BYTES:
        largest = sorted(files, key=lambda name: -sizes[name])[:3]
        listed = ", ".join(f"{name} ({sizes[name] / 1e6:.0f} MB)" for name in largest)
        raise UserError(
            f"{root} has {sum(sizes.values()) / 1e6:.0f} MB to send, at most {MAX_BYTES / 1e6:.0f} MB are possible: "
            f"list what the job does not need in .gitignore or .rayignore; the largest files are {listed}"
        )
    return Tree(root, tuple(files), tuple(withheld))


def write_package(target: Path, tree: Tree | None, config: str) -> None:
    """Writes the zip file. Equal contents give equal bytes, so that the cluster stores them once."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as package:

        def add(name: str, data: bytes, mode: int) -> None:
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.external_attr = (0o100000 | mode) << 16
            package.writestr(entry, data, zipfile.ZIP_DEFLATED)

        add(CONFIG, config.encode(), 0o600)
        for path, name in () if tree is None else ((tree.root / name, name) for name in tree.files):
            add(name, path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644)


def _candidates(root: Path) -> list[str]:
    """Lists the files of the tree that neither git nor .rayignore leaves out, sorted."""
    credentials = CREDENTIALS.split()  # these are reported, not silently left out
    ignored = [line for line in _lines(root / ".rayignore") if line not in credentials]
    listed = _listed_by_git(root)
    if listed is None:
        ignored += _lines(root / ".gitignore")
        listed = list(_walk(root, GitIgnoreSpec.from_lines(ignored)))
    spec = GitIgnoreSpec.from_lines(ignored)
    return sorted({name for name in listed if not spec.match_file(name)})


def _listed_by_git(root: Path) -> list[str] | None:
    """Lists the tree's files by git; None without git, or where git does not know the tree."""
    if shutil.which("git") is None:
        return None
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=root, capture_output=True, check=False)
    names = [name.decode(errors="surrogateescape") for name in found.stdout.split(b"\0") if name]
    return names if found.returncode == 0 and set(MARKS) <= set(names) else None


def _walk(root: Path, ignored: GitIgnoreSpec) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        subfolders[:] = [
            name
            for name in subfolders
            if name != ".git" and not ignored.match_file(f"{here / name}/")
        ]
        yield from (str(here / name) for name in files)


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def _named_as_credential(root: Path, name: str) -> bool:
    real = str((root / name).resolve().relative_to(root))
    return any(_credentials.match_file(one.lower()) for one in (name, real))


def _without_runs(files: list[str]) -> list[str]:
    """Drops the files of folders that are runs of calibprune."""
    runs = tuple(f"{name.removesuffix('run.json')}" for name in files if name.endswith("/run.json"))
    return [name for name in files if not name.startswith(runs)] if runs else files
