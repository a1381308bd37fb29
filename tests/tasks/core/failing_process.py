"""One of several processes, for tests/tasks/train/test_launcher.py: the argument says how each ends, by its rank.

A number is its exit code; `wait` is to wait for what never comes, as for another process that has failed; `tell` is to
tell of an error, before any of them ends.
"""

from __future__ import annotations

import os
import sys
import time

from tasks.core import stage
from tasks.core.errors import Transient

if __name__ == "__main__":
    end = sys.argv[1].split(",")[int(os.environ["RANK"])]
    if end == "wait":
        time.sleep(600)
    if end == "tell":
        stage._FIRST_TELLS_S = 0
        try:
            with stage.readable_errors():
                raise Transient("the training was stopped")
        finally:
            time.sleep(3)  # until the others have told, too
    sys.exit(int(end))
