"""Engines' programs for tests: the pretended one, and a real `llama-server` where there is one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from flows.serve.engines.start import DIALECTS, EngineChoice
from tests.conftest import ROOT


def pretended(name: str, folder: Path, *options: str) -> EngineChoice:
    """An engine that speaks as the one of this name does."""
    dialect = DIALECTS[name]
    program = folder / dialect.program
    words = shlex.join([sys.executable, str(ROOT / "tests" / "helpers" / "fake_engine.py")])
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    return EngineChoice(dialect, program, options=options)
