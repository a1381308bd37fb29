"""Runs the commands of all stages of a workspace in one process: `python -m tests.helpers.all_stages`."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from pathlib import Path

from tasks.core import pipeline

if __name__ == "__main__":
    for node in pipeline.load(Path.cwd()).values():
        os.environ["DVC_STAGE"] = node.name
        _, _, module, *sys.argv[1:] = shlex.split(node.command)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
