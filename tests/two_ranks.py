"""Runs scripts in this process, for test_two_ranks.py; by torchrun, those that a file lists."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers  # noqa: E402

import common  # noqa: E402


def run(script: str, flags: list[str], stop: int = 0, kill: bool = False) -> int:
    """-> how often this process has read weights. stop: the step in which the last rank, and it
    alone, gets a SIGTERM, or, with kill, its machine goes down: its launcher and it."""
    rate, read = common.learning_rate, vars(transformers.PreTrainedModel)["from_pretrained"]
    reads = []
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def learning_rate(step, *others):
        if step == stop and common.RANK == common.RANKS - 1:
            for process in [os.getppid(), os.getpid()] if kill else []:
                os.kill(process, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *others)

    def from_pretrained(kind, *args, **options):
        reads.append(args)
        return read.__func__(kind, *args, **options)

    common.learning_rate = learning_rate
    transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        importlib.import_module(script).main(flags)
        assert not stop
    except SystemExit as end:
        assert stop and end.code == 128 + signal.SIGTERM
    finally:
        common.learning_rate = rate
        transformers.PreTrainedModel.from_pretrained = read
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    return len(reads)


if __name__ == "__main__":
    path, reads = Path(sys.argv[1]), []
    for one in json.loads(path.read_text(encoding="utf-8")):
        reads.append(run(*one))
        path.with_name(f"reads-{common.RANK}.json").write_text(json.dumps(reads), encoding="utf-8")
