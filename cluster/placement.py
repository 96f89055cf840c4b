"""Placement groups: all of a group's resources, or none."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.errors import ResourceError


@dataclass(frozen=True)
class Placement:
    """Reserved bundles, one per actor, or per `tenants` actors that share its GPU."""

    group: PlacementGroup
    tenants: int = 1

    @property
    def num_bundles(self) -> int:
        return self.group.bundle_count

    def strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)

    def remove(self) -> None:
        remove_placement_group(self.group)


def pack_bundles(count: int, *, cpus: float, gpus: float, timeout_s: float, name: str, tenants: int = 1) -> Placement:
    """Reserves `count` equal bundles, on as few nodes as possible.

    Raises:
        ResourceError: they were not free in time; the message names the request and what is free.
    """
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    group = placement_group([bundle] * count, strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=timeout_s)
    if not ready:
        free = ray.available_resources()
        remove_placement_group(group)
        raise ResourceError(
            f"{name} needs {count} x {cpus:g} CPU and {gpus:g} GPU; after {timeout_s:.0f} s the cluster has "
            f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU free. "
            "Ask for less in the recipe's cluster section, add a node, or end the job that holds them."
        )
    return Placement(group, tenants)
