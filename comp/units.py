"""What a unit of an attention is: a whole head, or one dimension of all heads of a module.

Families describe their attentions by heads. The other kind is UPop's (arXiv 2301.13741): unit j
is column j of every head's query, key and value, so that all heads of a module get narrower
together and none goes.
"""

from dataclasses import replace
from typing import Literal

from comp.handle import Structure
from comp.sites import AttentionSite, Block


def with_unit(structure: Structure, unit: Literal["head", "head_dim"]) -> Structure:
    """Returns the structure of a dense model with another kind of attention unit.

    Args:
        structure: What a family says, by heads.
        unit: The kind.

    Raises:
        ValueError: If the heads cannot lose single dimensions, because positions rotate pairs of
            them or because several query heads share their keys.
    """
    if unit == "head":
        return structure
    encoders = {
        name: [_narrowing(structure.family, block) for block in blocks]
        for name, blocks in structure.encoders.items()
    }
    return replace(structure, encoders=encoders, unit=unit)


def _narrowing(family: str, block: Block) -> Block:
    cross = block.cross
    if cross is not None:
        cross = replace(cross, sites=tuple(_by_dimension(family, site) for site in cross.sites))
    return replace(block, attention=_by_dimension(family, block.attention), cross=cross)


def _by_dimension(family: str, site: AttentionSite) -> AttentionSite:
    if site.rotate is not None or site.queries_per_unit > 1:
        raise ValueError(
            f"unit 'head_dim' cannot be: {family} rotates pairs of dimensions by position or "
            "shares keys among heads, so that none can go alone; use unit 'head'"
        )
    return replace(site, fixed_heads=site.out.linear.in_features // site.head_dim)
