"""One way to end a command line: success, or an error message that says what to do."""

import argparse
import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from mocte_ds.bars import bars_as_lines
from mocte_ds.colour import paint
from mocte_ds.errors import MocteError

_ROOM, _PLACE = "make room, or name another folder", "name another path"
_RIGHTS = "change its rights, or name another path"
_EXTRAS = {
    "yaml": "train",
    "megatron": "train",
    "sentencepiece": "train",
    "tokenizers": "train",
    "pyarrow": "train",
    "tensorboard": "train",
    "transformers": "hf",
    "safetensors": "hf",
    "google": "hf",
    "lm_eval": "eval",
    "accelerate": "eval",
    "datasets": "eval",
    "matplotlib": "report",
}
"""Packages that `import mocte_ds` does without, and the extra of setup.py that brings each."""
_WAYS_OUT = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: _PLACE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENAMETOOLONG: "name a shorter one",
    errno.ENOTDIR: _PLACE,
    errno.EISDIR: _PLACE,
    errno.EEXIST: _PLACE,
    errno.ELOOP: _PLACE,
    errno.EIO: "look at the disk, or name another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
}
"""What a user can do about the machine's own errors."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with its result.

    Args:
        main: takes no arguments; returns an exit code or None for success.

    Errors that a user can mend, ours (:class:`MocteError`) and the machine's (a full disk, a path that cannot be
    used, a package of an extra that is not installed), are printed as one message; the exit code is 2, or the error's
    own. A reader of the output that goes away ends it without a word, with the exit code that other programs have then.
    Anything else is a defect of ours and keeps its stack trace.
    """
    try:
        with bars_as_lines():
            code = main() or 0
        sys.stdout.flush()
    except MocteError as error:
        _complain(str(error))
        code = error.exit_code
    except BrokenPipeError:
        if not any(map(_unread, (sys.stdout, sys.stderr))):
            raise  # another pipe or socket: a process that we talk to is gone
        _print_no_more()  # who reads has seen enough (`| head`)
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _WAYS_OUT:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror}; {_WAYS_OUT[error.errno]}.")
        code = 2
    except UnicodeDecodeError as error:
        if error.encoding != "ascii":
            raise
        _complain(
            "this Python takes text for ASCII (PYTHONUTF8=0 in an environment without a language), and files of "
            "torch are UTF-8: unset PYTHONUTF8, or set LC_ALL=C.UTF-8."
        )
        code = 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        _complain(f"this needs the package {package}; pip install 'mocte-ds[{_EXTRAS[package]}]', or [all].")
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def _unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe or socket whose reader is gone."""
    try:
        look = select.poll()
        look.register(stream.fileno(), 0)
        return any(found & (select.POLLERR | select.POLLHUP) for _, found in look.poll(0))
    except (OSError, ValueError, AttributeError):  # no file behind it
        return False


def _complain(text: str) -> None:
    print(f"{paint('error:', 'red', sys.stderr)} {text}", file=sys.stderr, flush=True)


def seconds(text: str) -> float:
    """A number of seconds, for argparse: finite and greater than 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number greater than 0")
    return number


def count(text: str) -> int:
    """A number of things that must be there, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def count_or_zero(text: str) -> int:
    """A number of things, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return number


def print_all(text: str) -> None:
    """Print a long text as the last thing that a tool does; a reader that has seen enough (`| head`) is a success."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _print_no_more()


def _print_no_more() -> None:
    # Python would complain again when it closes stdout.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
