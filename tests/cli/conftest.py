"""The command line run in this process, or as a user would run it."""

import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers.utils import logging as theirs

from echelon.cli import main

SOURCE = Path(__file__).parents[2] / "src"


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """Its complaint, which must be one line on stderr, with nothing on stdout and status 2."""
        assert self.code == 2 and self.out == "", self
        assert self.err.startswith("echelon: ") and self.err.count("\n") == 1, self.err
        return self.err


@pytest.fixture(scope="module", autouse=True)
def libraries_as_before():
    """A command owns its process and silences libraries there; the tests after these must not notice."""
    bars, level, format_warning = theirs.is_progress_bar_enabled(), theirs.get_verbosity(), warnings.formatwarning
    yield
    (theirs.enable_progress_bar if bars else theirs.disable_progress_bar)()
    theirs.set_verbosity(level)
    warnings.formatwarning = format_warning


@pytest.fixture
def echelon(capsys):
    """Run a command in this process."""

    def run(*words):
        theirs.disable_progress_bar()
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return run


def started(*words, **how):
    """A command in a process of its own."""
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests that a shell runs in the background were told to ignore it
    return subprocess.Popen([sys.executable, "-m", "echelon.cli", *map(str, words)], env=environment, text=True, preexec_fn=heeds, **streams)


@pytest.fixture
def process():
    """Run a command in a process of its own to its end; ``process.start`` only starts it."""

    def run(*words, **how):
        running = started(*words, **how)
        out, err = running.communicate(timeout=120)
        return Ran(running.returncode, out, err)

    run.start = started
    return run
