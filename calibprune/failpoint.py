"""Named points at which tests kill a process or take its GPU's memory away, to show that nothing is lost there."""

import os
import signal
from pathlib import Path

OUT_OF_MEMORY = "out of memory"


def failpoint(name: str) -> None:
    """Sends this process the signal whose number is in the file `name` of the folder CALIBPRUNE_FAILPOINTS.

    Removes the file first, so that it happens once. Does nothing where the variable is not set. Raises
    torch.OutOfMemoryError where the file says `out of memory`.
    """
    folder = os.environ.get("CALIBPRUNE_FAILPOINTS")
    if folder is None:
        return
    order = Path(folder) / name
    try:
        text = order.read_text()
        order.unlink()
    except FileNotFoundError:
        return
    if text == OUT_OF_MEMORY:
        import torch  # which callers that need no tensors do not wait for

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")
    os.kill(os.getpid(), int(text or signal.SIGKILL))
