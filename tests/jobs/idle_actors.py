"""Actors that take the room of a rank or of a rollout worker and note what is asked of them. They load no torch."""

import ray


class IdleRank:
    """Holds a rank's place and notes what is asked of it."""

    def __init__(self, rank, world_size):
        self._asked = []

    def free_address(self):
        return "localhost:1"

    def build(self, factory, arguments, address):
        pass

    def meet_engines(self, receivers, workers, address, deadline_s):
        self._asked.append((receivers.weight_transfer, len(workers), receivers.dtype, deadline_s))

    def send_weights(self):
        pass

    def peak_memory(self):
        return {"memory/rank_peak_gib": 1.5}

    def asked(self):
        return self._asked


class IdleWorker:
    """Holds a rollout worker's place."""

    def __init__(self, name):
        self._calls = []

    def start(self, model_uri, config, plan, dtype, max_model_len, seed):
        self._calls.append(plan)

    def sleep(self):
        self._calls.append("sleep")

    def accept_weights(self, weights, tolerance):
        self._calls.append("accept")
        return {
            "gate/mean": 0.0,
            "gate/max": 0.0,
            "weights/seconds": 0.5,
            "weights/gb_per_s": 2.0,
            "weights/copy_gb_per_s": 8.0,
            "weights/copies_fetched": 0.0,
            "memory/rollout_worker_peak_gib": 2.5,
        }

    def calls(self):
        return self._calls


def gpu(actor):
    """Node and number of the GPU that Ray gave the actor, and the share of it."""
    context = ray.get_runtime_context()
    [number] = context.get_accelerator_ids()["GPU"]
    shares = {share for name, share in context.get_assigned_resources().items() if name.startswith("GPU")}
    return context.get_node_id(), number, shares
