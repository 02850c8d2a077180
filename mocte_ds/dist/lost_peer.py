"""What gloo and NCCL say when another rank has ended."""

_SIGNS = (
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
        if isinstance(found, RuntimeError) and any(sign in str(found).lower() for sign in _SIGNS):
            return True
        found = found.__cause__ or found.__context__
    return False
