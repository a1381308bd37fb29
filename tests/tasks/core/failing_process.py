"""One of several processes, for tests/tasks/train/test_launcher.py: the argument says how each ends, by its rank.

A number is its exit code; `wait` is to wait for what never comes, as for another process that has failed.
"""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":
    end = sys.argv[1].split(",")[int(os.environ["RANK"])]
    if end == "wait":
        time.sleep(600)
    sys.exit(int(end))
