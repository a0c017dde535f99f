"""What a topic is: its name, what it says and computes, its sources, and where attncli looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from attncli.records.pages import Block


class Topic(NamedTuple):
    """A screenful. `blocks` computes its numbers anew each time; they are the same each time.

    `rules`: codes of the rules that judge it. `commands`: as a user types them, without "attncli". `see`: names of
    other topics.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    blocks: Callable[[], tuple[Block, ...]]
    sources: tuple[str, ...]
    rules: tuple[str, ...]
    commands: tuple[str, ...]
    see: tuple[str, ...]
