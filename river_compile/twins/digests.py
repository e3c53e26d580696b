"""The digests of a model's parameters, which are read again only where their stamp has changed.

Not handled: changes that no stamp shows (:mod:`river_compile.twins.weights`), for which there is `Digests.forget`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from torch import Tensor

from river_compile.passes.program import Matmul
from river_compile.twins.threads import in_threads
from river_compile.twins.weights import Parameters, ParameterStamp, digest_of

_REMEMBERED = 8  # digests kept per matmul of a program


class Digests:
    """The known digests. Thread-safe."""

    def __init__(self) -> None:
        self._stamped: dict[tuple[int, ...], tuple[ParameterStamp, str]] = {}  # by the parameters' ids
        self._lock = threading.Lock()

    def of(self, parameters: Mapping[Matmul, Parameters]) -> dict[Matmul, str]:
        """Return the digests of matmuls' parameters; those with the known stamp are not read."""

        def digest(given: Parameters) -> str:
            known = self.known(given.tensors)
            if known is None:
                known = digest_of(given.tensors)
                self.note(given.tensors, known)
            return known

        with self._lock:
            if len(self._stamped) > _REMEMBERED * len(parameters):  # most are of parameters that are gone
                self._stamped.clear()
            # A twin and the backbone may share parameters: hash them once.
            distinct = {tuple(map(id, given.tensors)): given for given in parameters.values()}
            found = dict(zip(distinct, in_threads(digest, distinct.values()), strict=True))
        return {matmul: found[tuple(map(id, given.tensors))] for matmul, given in parameters.items()}

    def known(self, tensors: Sequence[Tensor]) -> str | None:
        """Return the digest of tensors, None if their stamp has changed."""
        stamp, digest = self._stamped.get(tuple(map(id, tensors)), (None, ""))
        return digest if stamp is not None and stamp == ParameterStamp(tensors) else None

    def note(self, tensors: Sequence[Tensor], digest: str) -> None:
        """Remember the digest of tensors as they are now."""
        self._stamped[tuple(map(id, tensors))] = ParameterStamp(tensors), digest

    def forget(self) -> None:
        """Have all parameters read again."""
        self._stamped.clear()
