"""The errors that mocte_ds raises for things that a user can mend; each message says what, where and what to do."""


class MocteError(Exception):
    """Base of all errors whose message is written for the user; command lines print it without a stack trace."""

    exit_code = 2
    """Of a command line that it ends. Launchers do not start a run again after 2: the user has to mend something."""


class ConfigError(MocteError, ValueError):
    """A key or value of a configuration is unknown, out of range or contradicts another one."""


class NotOurs(ConfigError):
    """A tool would remove or overwrite something that it cannot show to have written, or that it reads from."""


class DataError(MocteError):
    """A corpus, tokenizer or prepared data set is missing, unreadable or does not fit."""


class CheckpointError(MocteError):
    """A checkpoint is missing, incomplete, damaged or belongs to another configuration."""


class NonFiniteLoss(MocteError):
    """The loss became NaN or infinite; the run stops and the last good checkpoint stays."""


class Disagreement(MocteError):
    """The ranks would act on different decisions; the run stops before any of them acts."""


_SIGNS_OF_LOSS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "remote process exited",
    "socket closed",
    "communicator was aborted",
    "no longer connected",
)


def peer_is_lost(error: BaseException) -> bool:
    """Whether an error is only the echo of another rank's end."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, RuntimeError) and any(sign in str(found).lower() for sign in _SIGNS_OF_LOSS):
            return True
        found = found.__cause__ or found.__context__
    return False
