"""How the image embedding and the tokens that the decoder sees are pooled (paper, Section 3.2).

A model has one kind (`config.model.pooler.kind`). This file alone parses that name; all else asks
the kind.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)  # modules that hold equal kinds are equal
class PoolerKind:
    """A kind of pooling.

    Attributes:
        name: in config.model.pooler.kind.
        second_pooler: whether a pooler of its own makes the embedding; else the first query of the
            only one does.
        in_cascade: whether the second pooler reads what the first one found; else the encoder.
        pools: whether there is any pooler; else the class token is the embedding and the decoder
            sees the encoder's tokens of patches.
    """

    name: ClassVar[str]
    second_pooler: ClassVar[bool] = True
    in_cascade: ClassVar[bool] = False
    pools: ClassVar[bool] = True

    @property
    def by_query(self) -> bool:
        """Whether the first query of the only pooler makes the embedding."""
        return self.pools and not self.second_pooler

    @property
    def of_captions(self) -> bool:
        """Whether captions alone depend on the first pooler: the second one reads the encoder."""
        return self.second_pooler and not self.in_cascade

    def num_seen(self, num_queries: int) -> int:
        """Of so many queries, those whose tokens the decoder sees."""
        return num_queries - self.by_query

    def check(self, num_queries: int) -> None:
        """Raises ValueError where no query is left for the decoder."""
        if self.num_seen(num_queries) < 1:
            raise ValueError(
                f"model.pooler.num_queries={num_queries}; {self.name} needs at least "
                f"{num_queries + 1 - self.num_seen(num_queries)}"
            )


class Cascade(PoolerKind):
    """The contrastive pooler reads the generative one's output: the paper's."""

    name, in_cascade = "cascade", True


class Parallel(PoolerKind):
    """Both read the encoder."""

    name = "parallel"


class OpenClip(PoolerKind):
    """One pooler, whose first query is the image embedding: open_clip's older models."""

    name, second_pooler = "open_clip", False


class Without(PoolerKind):
    """No pooler: open_clip's models without attentional_pool, such as its coca_base."""

    name, second_pooler, pools = "none", False, False


KINDS: dict[str, type[PoolerKind]] = {
    kind.name: kind for kind in (Cascade, Parallel, OpenClip, Without)
}


def of(name: str) -> PoolerKind:
    """The kind that config.model.pooler.kind names. Raises ValueError where there is none."""
    if name not in KINDS:
        raise ValueError(f"model.pooler.kind={name!r}; choose from {', '.join(KINDS)}")
    return KINDS[name]()
