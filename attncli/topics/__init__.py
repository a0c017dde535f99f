"""What attention is, a screenful a topic, each with a small computation done live. Standard library; no torch.

A new topic is one row in the table of its file and one function that returns its blocks.
"""

from __future__ import annotations

from attncli.topics.basics import BASIC_TOPICS
from attncli.topics.heads import HEAD_TOPICS
from attncli.topics.health import HEALTH_TOPICS
from attncli.topics.numerics import NUMERIC_TOPICS
from attncli.topics.topic import Topic
from attncli.topics.training import TRAINING_TOPICS
from attncli.topics.usage import USAGE_TOPICS

__all__ = ["TOPICS", "Topic"]

TOPICS: tuple[Topic, ...] = (
    *BASIC_TOPICS,
    *HEAD_TOPICS,
    *HEALTH_TOPICS,
    *NUMERIC_TOPICS,
    *TRAINING_TOPICS,
    *USAGE_TOPICS,
)
