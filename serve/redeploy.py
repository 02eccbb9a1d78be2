"""`python -m serve.redeploy CONFIG [section.key=value ...]`: put the running application in other settings' place.

Replaces every replica, a few at a time, as `serve deploy` does; for an application that `serve.app` has started,
whose cluster has no dashboard to deploy to. Sessions move: LLM replicas release theirs as they end, gateways' sockets
close. Run `serve.drain` before it to tell clients. Joins the Ray cluster of RAY_ADDRESS; Redis is that of `bus.url` or
REDIS_URL, which must be the one the application has.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

import ray
from ray import serve as ray_serve

from actors.config import ConfigError, load_config
from serve.app import APPLICATION, StartError, assemble, redis_url


def redeploy(path: str, overrides: list[str]) -> None:
    """Return once every replica is new. Raises ConfigError, and StartError where there is nothing to redeploy."""
    config = load_config(path, overrides)
    redis = redis_url(config)
    if redis is None:
        raise StartError("no Redis address: set REDIS_URL or bus.url to that of the running application")
    if "RAY_ADDRESS" not in os.environ:
        raise StartError("no cluster: set RAY_ADDRESS to what serve.app printed")
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    if APPLICATION not in ray_serve.status().applications:
        raise StartError(f"no application {APPLICATION!r} runs on this cluster")
    try:
        ray_serve.run(assemble(config, redis), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise StartError(f"the application was not redeployed: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when there is nothing to redeploy or the new replicas do not start."""
    parser = argparse.ArgumentParser(prog="python -m serve.redeploy", description="Replace all replicas.")
    parser.add_argument("config", help="settings file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    try:
        redeploy(options.config, options.overrides)
    except (ConfigError, StartError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("redeployed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
