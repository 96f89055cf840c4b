"""What Ray raises when an actor is gone."""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

DIED = (RayActorError, OutOfMemoryError, NodeDiedError)
"""Three unrelated classes: the process ended, Ray's memory monitor ended it, or its node went with it."""
