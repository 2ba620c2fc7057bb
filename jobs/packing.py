"""What travels with a submitted job: the source tree it is submitted from and its configuration, in one zip file.

Stays behind: what git ignores, caches, runs, model weights, and whatever looks like a credential, by its name or by
what is in it. A package is stored by the cluster and unpacked on every node, where others can read it.
"""

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from calibprune.errors import UserError
from calibprune.redact import SECRET_NAME, shaped_as_credential

CONFIG = "calibprune-submitted.yaml"
"""The configuration's name in the package."""
MOST_BYTES = 100 << 20
"""Of a package before it is compressed: it goes through the cluster's head."""
SEARCHED_AT_ONCE = 1 << 20
LONGEST_CREDENTIAL = 4096
"""Characters, as is the former: so many are searched with the piece before and with the one after."""

NOT_SOURCE = """
    .git .hg .svn .venv* venv .tox .nox __pycache__ *.py[co] *.egg-info .*_cache .cache .ipynb_checkpoints .DS_Store
    node_modules /build /dist /runs wandb mlruns *.tmp
    *.safetensors *.bin *.pt *.pth *.ckpt *.gguf *.onnx *.h5 *.msgpack
"""
"""What is no source, in the patterns of .gitignore."""
CREDENTIALS = """
    .env .env.* *.env .envrc *.pem *.key *.p12 *.pfx *.jks *.kdbx *.ppk *.keytab id_rsa* id_dsa* id_ecdsa* id_ed25519*
    .netrc _netrc .pgpass .pypirc .npmrc .htpasswd .git-credentials .boto .s3cfg .dockercfg rclone.conf
    credentials credentials.* *credentials*.json client_secret*.json *service[-_]account*.json
    *[-_]key.json adc.json secret.* secrets.* *.secret kubeconfig* *.tfstate*
    token token.txt *[-_]token *[-_]token.txt *.token
    .aws .azure .config .docker .gcloud .gnupg .huggingface .kube .ray .ssh
"""
"""Files and folders that hold credentials by their names."""
_SETTING = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]{1,100})["']?\]?(?P<between>[ \t]*(?::=|[:=](?!=))[ \t]*)["']?"""
    r"""(?P<value>[\w+/=.~@:!-]{6,1000}+)(?=["'\s,;)}\]#]|$)"""
)
_CODE = re.compile(
    r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+|\.{0,2}/[\w./-]*|~/.*|\w+://.*"
    r"|[a-z]{1,12}(_[a-z0-9]{1,12})+|[\d_.]+|[\w.-]+\.(safetensors|json|txt|py|ya?ml|bin)"
)
"""A value that is looked up, says where something lies, or is a number."""
_PLACEHOLDER = re.compile(
    r"(your|my|some|change|replace|example|dummy|placeholder|insert|x{3}|\.{3})", re.I
)


_no_source = GitIgnoreSpec.from_lines(NOT_SOURCE.split())
_credentials = GitIgnoreSpec.from_lines(CREDENTIALS.split())


@dataclass(frozen=True)
class Tree:
    """The files of a source tree that travel."""

    root: Path
    files: tuple[str, ...] = ()
    """Paths relative to the root, sorted."""
    withheld: tuple[str, ...] = ()
    """Those that stay because they look like credentials."""

    def holds(self, path: str) -> bool:
        """Whether a file, or all of a folder, travels; the path is relative to the root."""
        full = (self.root / path).resolve()
        files = full.rglob("*") if full.is_dir() else [full]
        inside = [file for file in files if file.is_file()]
        known = {(self.root / file).resolve() for file in self.files}
        return bool(inside) and known.issuperset(inside)


def source_tree(folder: Path) -> Tree | None:
    """The files of a checkout of calibprune that travel; None where the folder is no such checkout.

    Raises UserError, naming the largest files, where they are too many bytes.
    """
    root = folder.resolve()
    if not all((root / name).is_file() for name in ("jobs/__main__.py", "calibprune/stage.py")):
        return None
    files, withheld = [], []
    for name in sorted(set(_candidates(root))):
        path = root / name
        if name == CONFIG or _no_source.match_file(name) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):  # a link that leads out of the tree
            continue
        (withheld if _named_as_secret(root, name) else files).append(name)
    files = _without_runs(files)
    sizes = {name: (root / name).stat().st_size for name in files}
    if sum(sizes.values()) > MOST_BYTES:
        largest = sorted(files, key=lambda name: -sizes[name])[:3]
        listed = ", ".join(f"{name} ({sizes[name] / 1e6:.0f} MB)" for name in largest)
        raise UserError(
            f"{root} has {sum(sizes.values()) / 1e6:.0f} MB to send, at most {MOST_BYTES / 1e6:.0f} MB go along: name "
            f"what the job does not need in .gitignore or .rayignore; the largest files are {listed}"
        )
    holding = [name for name in files if any(map(holds_secret, _pieces(root / name)))]
    files = [name for name in files if name not in holding]
    return Tree(root, tuple(files), tuple(sorted(withheld + holding)))


def write_package(target: Path, tree: Tree | None, config: str) -> None:
    """Writes the zip file. The same contents give the same bytes, so that the cluster stores them once."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as package:

        def add(name: str, data: bytes, mode: int) -> None:
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.external_attr = (0o100000 | mode) << 16
            package.writestr(entry, data, zipfile.ZIP_DEFLATED)

        add(CONFIG, config.encode(), 0o600)
        for path, name in () if tree is None else ((tree.root / name, name) for name in tree.files):
            add(name, path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644)


def _candidates(root: Path) -> Iterator[str]:
    """Files of the tree that are not ignored: by git's own word, else by the root's ignore files."""
    named = CREDENTIALS.split()  # which are told apart from what is merely ignored
    lines = [line for line in _lines(root, [".rayignore"]) if line not in named]
    listed = _listed_by_git(root)
    if listed is None:
        lines = _lines(root, [".gitignore"]) + lines
        listed = _walk(root)
    ignored = GitIgnoreSpec.from_lines(lines)
    yield from (name for name in listed if not ignored.match_file(name))


def _listed_by_git(root: Path) -> list[str] | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=root, capture_output=True, check=False)
    if found.returncode:
        return None
    return [name.decode(errors="surrogateescape") for name in found.stdout.split(b"\0") if name]


def _walk(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        subfolders[:] = [
            name for name in subfolders if not _no_source.match_file(f"{here / name}/")
        ]
        yield from (str(here / name) for name in files)


def _lines(root: Path, names: Sequence[str]) -> list[str]:
    files = [root / name for name in names]
    return [
        line for file in files if file.is_file() for line in file.read_text("utf-8").splitlines()
    ]


def _named_as_secret(root: Path, name: str) -> bool:
    real = str((root / name).resolve().relative_to(root))
    return any(_credentials.match_file(one.lower()) for one in (name, real))


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file, however long: each piece begins with the end of the one before, so that no credential is
    cut through in all of them."""
    end = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while text := file.read(SEARCHED_AT_ONCE):
            yield end + text
            end = text[-LONGEST_CREDENTIAL:]


def holds_secret(text: str) -> bool:
    """Whether a file's text holds a private key, a token of a well-known kind, a password or signature in an address,
    or a value given to a name that says it is secret."""
    return shaped_as_credential(text) or any(map(_gives_secret, _SETTING.finditer(text)))


def _gives_secret(setting: re.Match[str]) -> bool:
    """Code and documents name secrets more often than they give them: a word after such a name is none, but where it
    is set as a shell does."""
    name, value = setting["name"], setting["value"]
    if not SECRET_NAME.search(name) or _CODE.fullmatch(value) or _PLACEHOLDER.match(value):
        return False
    as_shell = name.isupper() and setting["between"] == "="
    digits = sum(sign.isdigit() for sign in value)
    return as_shell or (len(value) >= 10 and 0 < digits < len(value))


def _without_runs(files: list[str]) -> list[str]:
    """Leaves out folders that are runs of calibprune."""
    runs = tuple(f"{name.removesuffix('run.json')}" for name in files if name.endswith("/run.json"))
    return [name for name in files if not name.startswith(runs)] if runs else files
