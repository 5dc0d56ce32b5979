"""How a rank tells that another one is gone."""

#: How gloo, NCCL and the store say that the other side of a connection is gone.
_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "remote process exiting prematurely",
)


def is_lost_peer(message: str) -> bool:
    """Whether an error only says that another rank went away: the one to look for is that other."""
    return any(words in message for words in _WORDS)
