"""The errors that Ray raises when an actor is gone."""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

ACTOR_DIED = (RayActorError, OutOfMemoryError, NodeDiedError)
"""For `except`. Three unrelated classes: the process ended, Ray's memory monitor ended it, or its node was lost."""
