"""The errors that Ray raises when an actor is gone."""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

ACTOR_DIED = (RayActorError, OutOfMemoryError, NodeDiedError)
"""The three errors of a dead actor: its process ended, Ray's memory monitor ended it, or its node was lost. The
classes have no common base."""
