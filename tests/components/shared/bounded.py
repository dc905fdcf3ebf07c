"""One of several processes that loads a model, shards it and writes it, and says how much memory each part took.

torchrun ... -m tests.components.shared.bounded MODEL OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed

from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.sharded_saving import save_sharded
from mixtune.components.shared.model.sharding import shard

from .tiny import tiny_tokenizer

EVERY_SECONDS = 0.002


def anonymous_bytes() -> int:
    """Memory of this process that is no part of a file, and so cannot be given back and read again."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@contextmanager
def measured(rises: dict[str, int], name: str) -> Iterator[None]:
    """Notes by how many bytes the memory rises at most."""
    start = peak = anonymous_bytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(EVERY_SECONDS):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    rises[name] = max(peak, anonymous_bytes()) - start


def main(source: str, output: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    rises: dict[str, int] = {}
    cpu = torch.device("cpu")
    with measured(rises, "load"):
        model = load_model(source, cpu, as_stored=True)
    with measured(rises, "shard"):
        shard(model, cpu, "float32")
    if rank == 0:
        output.mkdir()
    with measured(rises, "save"):
        save_sharded(model, output, tiny_tokenizer(), rank == 0)
    (output.parent / f"rises-{rank}.json").write_text(json.dumps(rises))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], Path(sys.argv[2]))
