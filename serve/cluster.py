"""The Ray cluster of the application: the one of RAY_ADDRESS, else one that lives and dies with this program."""

from __future__ import annotations

import logging
import os

import ray
import ray._private.utils
from ray._private import ray_constants

from actors.runtime import local_ray_environment
from serve.signals import end_at_once_on_signal

OBJECT_STORE_BYTES = 128 << 20  # nothing large passes through Ray: frames and tokens travel by Redis


def start(num_cpus: int, log_to_driver: bool) -> None:
    """Join the cluster of RAY_ADDRESS, else start one on this machine's loopback that ends with this program."""
    try:
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=log_to_driver, logging_level=logging.WARNING)
        else:
            _start_local(num_cpus, log_to_driver)
    finally:
        end_at_once_on_signal()  # Ray's native code has set handlers of its own


def _start_local(num_cpus: int, log_to_driver: bool) -> None:
    local_ray_environment()
    # Ray took this one from the environment when it was imported, before we could set it.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
    # Ray's handler raises SystemExit wherever its start has got to, which has left locks held (serve/signals.py).
    ray._private.utils.set_sigterm_handler = lambda handler: None
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=log_to_driver,
        logging_level=logging.WARNING,
    )
