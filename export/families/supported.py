"""What can be exported: every architecture with a published model, as families declare it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from embedge.export.families import FAMILIES
from embedge.export.families.base import Family

__all__ = ["Supported", "supported"]


class Supported(NamedTuple):
    """One architecture.

    Attributes:
        architecture: ``model_type`` in config.json, but where another key or the model's name tells it.
        family: the name of its family's class.
        about: the family in a sentence.
        example: a published model's id on the hub; empty where the family names none.
    """

    architecture: str
    family: str
    about: str
    example: str


def supported(families: Sequence[type[Family]] = FAMILIES) -> list[Supported]:
    """Every architecture of some families, by name; once where several families read its layouts."""
    found = (
        Supported(kind, family.__name__, _about(family), family.examples.get(kind, ""))
        for family in families
        for kind in family.model_types
    )
    return sorted({(one.architecture, one.example): one for one in found}.values())


def _about(family: type[Family]) -> str:
    return (family.__doc__ or "").strip().partition("\n")[0].rstrip(".")
