"""One way to end a command line: success, or an error message that says what to do."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mocte_ds.errors import MocteError


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with its result.

    Args:
        main: takes no arguments; returns an exit code or None for success.

    Errors that a user can mend (:class:`MocteError`) and a full disk are printed as one message, exit code 2. Anything
    else is a defect of ours and keeps its stack trace.
    """
    try:
        code = main() or 0
    except MocteError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: cannot write{where}: {error.strerror}; make room or choose another folder.", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def print_all(text: str) -> None:
    """Print a long text; a reader that has seen enough (`| head`) ends it without a complaint."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would complain again when it closes stdout.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
