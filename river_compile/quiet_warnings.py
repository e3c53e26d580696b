"""Keeps what a dependency of this package would say in every program from being said.

transformers imports torchao where it is installed, and this package installs it for its solver. torchao then logs each
extension for other machines that it cannot load, and torch that torchao registers enums in an old way: true, and
nothing that a user of a model can act on.
"""

from __future__ import annotations

import logging

_SAID = {"torchao": "Failed to load ", "torch.utils._pytree": "is an Enum subclass and is now natively supported"}


def _says_more(record: logging.LogRecord) -> bool:
    return _SAID[record.name] not in str(record.msg)


def leave_out() -> None:
    """Drops these messages, and no other ones, from now on."""
    for name in _SAID:
        logging.getLogger(name).addFilter(_says_more)
