"""The Ray cluster a job runs on: the one it was submitted to, else one of its own on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants

from actors.runtime import local_ray_environment

logger = logging.getLogger(__name__)


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside `ray job submit`), else start a local one.

    The local one listens on the loopback interface only, has `num_cpus` logical CPUs (default: the
    machine's) and ends with this process. Does nothing where this process has joined one already.
    """
    if ray.is_initialized():
        return
    with _own_end():
        _connect(num_cpus)


@contextmanager
def _own_end() -> Iterator[None]:
    """Keep what a program does at SIGTERM: ray.init puts something of Ray's in its place, which says nothing."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _connect(num_cpus: int | None) -> None:
    if not is_local():
        ray.init()
        return
    local_ray_environment()
    # Ray took this one from the environment when it was imported, before we could set it.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
    # "local" never joins a cluster that another program left running on this machine.
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False)
    logger.info("ray=local cpus=%s", ray.cluster_resources().get("CPU"))


def is_local() -> bool:
    """Whether `connect` starts a cluster of this program's own."""
    return "RAY_ADDRESS" not in os.environ


def cpus_of_one(wanted: float, gpus: float = 0) -> float:
    """CPUs to reserve for an actor of `wanted` threads: no more than a machine of the cluster has, or it never starts.

    Of machines with `gpus` GPUs for an actor that needs these. A cluster whose machines have no CPUs yet (a head
    without work that will grow) is asked for all of them.
    """
    fitting = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus]
    largest = max((resources.get("CPU", 0.0) for resources in fitting), default=0.0)
    return min(wanted, largest) if largest else wanted
