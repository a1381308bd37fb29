"""Python imports this when it starts, if the folder is on PYTHONPATH: it writes down every connection that is tried.

Every process that inherits the environment is watched, so a whole run is, with its servers and stages.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def _write_down(asked: object) -> None:
    with open(os.environ["TEMPER_TEST_CONNECTIONS"], "a") as file:
        file.write(f"{asked}\t{' '.join(sys.orig_argv)[:200]}\n")


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _write_down(arguments[1][0])
    elif event == "socket.getaddrinfo":
        _write_down(arguments[0])


if "TEMPER_TEST_CONNECTIONS" in os.environ:
    _write_down("started")
    sys.addaudithook(_hear)
