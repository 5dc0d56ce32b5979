"""Recognises errors that say that another rank is gone."""

#: Words of gloo, NCCL and the store for a connection whose other side is gone.
_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "remote process exiting prematurely",
)


def is_lost_peer(message: str) -> bool:
    """Whether an error only says that another rank is gone. The cause is then an error of that other rank."""
    return any(words in message for words in _WORDS)
