"""What each of the ranks that share a model packed, exchanged when a graph is made: any rank can report it later.

Not handled: models on one rank, of which the report alone says what stays in 16 bits.
"""

from __future__ import annotations

import math
import warnings

from river_compile.distributed.ranks import Ranks
from river_compile.errors import RiverWarning
from river_compile.passes.program import RiverProgram
from river_compile.passes.routing import ROUTER
from river_compile.state import GraphRecord
from river_compile.twins.pack import GraphTwins


def note_ranks(program: RiverProgram, record: GraphRecord, ranks: Ranks) -> None:
    """Notes what each rank packed for a graph, and warns of what stays in 16 bits, routers aside."""
    if not ranks.several or not program.twins:
        return
    packed = record.of(GraphTwins)
    mine = {
        "rank": ranks.name,
        "matrices": len(packed),
        "bytes": sum(site.nbytes for site in packed),
        "in_16_bits": len(program.kept),
        "least_sqnr": min((site.quality for site in packed), default=math.inf),
    }
    record.ranks = ranks.gather(mine)
    kept = [linear for linear in program.kept if linear.reason != ROUTER]
    if kept:
        warnings.warn(
            f"{len(kept)} matrices of the twins of a {program.plan.kind} graph stay in 16 bits on {ranks.name}, so "
            f"that tokens that leave read more than they need to; the first is {kept[0].name}: {kept[0].reason}",
            RiverWarning,
            stacklevel=2,
        )
