"""Run by torchrun with two processes: every script named on the command line in turn, in one process group."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

if __name__ == "__main__":
    for name, flags in json.loads(Path(sys.argv[1]).read_text()):
        __import__(name).main(flags)
