"""What is said of a tag-driven format that cannot be meant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from anabranch._check import whole_fields

if TYPE_CHECKING:
    from anabranch.strategies.tagged.tagged import Tagged

_CHOICES = {
    "join": ("reprefill", "concat"),
    "repeats": ("drop", "keep"),
    "misfit": ("text", "end"),
    "stray": ("text", "end"),
}


def check_fields(form: Tagged) -> None:
    """ValueError, in the name of the format's class, for the first field that is wrong."""
    name = type(form).__name__
    for field in ("trigger", "opening", "stop"):
        if getattr(form, field) not in form.tags:
            raise ValueError(f"{name}: {field}={getattr(form, field)!r} is not one of tags={form.tags}")
    for field in ("outline", "shape"):
        try:
            groups = re.compile(getattr(form, field)).groups
        except re.error as error:
            raise ValueError(f"{name}: {field}={getattr(form, field)!r} is no regular expression: {error}") from None
        if field == "outline" and not groups:
            raise ValueError(f"{name}: outline={form.outline!r} has no group; put (…) around an outline's id")
    if "{id}" not in form.header:
        raise ValueError(f"{name}: header={form.header!r} does not hold {{id}}; put it where the outline's id goes")
    for field, allowed in _CHOICES.items():
        if getattr(form, field) not in allowed:
            raise ValueError(f"{name}: {field}={getattr(form, field)!r}; pass {' or '.join(map(repr, allowed))}")
    for field in ("own_opening", "overlap", "nested"):
        if not isinstance(getattr(form, field), bool):
            raise ValueError(f"{name}: {field}={getattr(form, field)!r}; pass True or False")
    if form.join == "concat" and form.next_header is not None:
        raise ValueError(f"{name}: next_header={form.next_header!r} with join='concat', which keeps each header")
    if form.join == "concat" and not form.after:
        raise ValueError(f"{name}: after is empty; behind join='concat' the trunk needs a token to go on from")
    if form.overlap and (form.join != "concat" or not form.lead):
        raise ValueError(f"{name}: overlap=True needs join='concat' and a lead, whose last position is shared")
    limits = ("max_outlines", "max_blocks", "max_iterations", "max_threads", "thread_tokens")
    whole_fields(form, limits, optional={*limits} - {"max_blocks"})
    whole_fields(form, ("kept", "min_left", "max_depth", "reserve"), 0, optional=("max_depth", "reserve"))
