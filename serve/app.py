"""The application: `python -m serve.app configs/embedded.yaml` keeps it up, `serve run configs/serve.yaml` too.

`build` puts the deployments together; `running` is the whole of it for programs that start
everything themselves: Redis, Ray, the application, and their end in reverse order.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray._private import ray_constants
from ray.serve import Application, Deployment

from actors.bus import BusConfig, BusError
from actors.config import Config, ConfigError, load_config
from actors.encoder import EncoderConfig
from actors.engine import EngineConfig
from actors.redis_server import RedisServer, RedisServerError
from actors.runtime import local_ray_environment
from serve.api import API_KEY_VARIABLE, is_loopback
from serve.deployments import EncoderReplica, GatewayReplica, LLMReplica, RedisReplica
from serve.gateway import ServeConfig

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 << 20  # nothing large passes through Ray: frames and tokens travel by Redis
APPLICATION = "videollm"
SPARE_REQUESTS = 1000  # a WebSocket holds one request slot for its life: the gateway's own limit must come first
HEALTH_CHECK_PERIOD_S = 2  # a dead loop must not go unnoticed for Serve's default of 10 s
REPOSITORY = Path(__file__).parents[1]


class AppArgs(BaseModel):
    """What `serve run` passes on from the `args` of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    config: str = "configs/embedded.yaml"
    overrides: list[str] = []


class StartError(RuntimeError):
    """The application cannot start; says what to change."""


def build(args: AppArgs) -> Application:
    """The application for `serve run` and `serve deploy`; Redis is the address given or one of its own."""
    path = Path(args.config)
    config = load_config(path if path.is_file() else REPOSITORY / path, args.overrides)
    return assemble(config, redis_url(config))


def assemble(config: Config, redis: str | None) -> Application:
    """Gateway in front of encoder and LLM, each a deployment of its own with processes of its own."""
    settings = config.section("serve", ServeConfig)
    encoder_threads = config.section("encoder", EncoderConfig).threads
    llm_threads = config.section("engine", EngineConfig).threads
    address = redis or _deployment("redis", settings)(RedisReplica).bind()
    encoder = _deployment(
        "encoder", settings, settings.encoders, encoder_threads, settings.encoder_cpus, settings.encoder_gpus
    )
    llm = _deployment("llm", settings, settings.llms, llm_threads, settings.llm_cpus, settings.llm_gpus)
    gateway = _deployment("gateway", settings, settings.gateways, num_cpus=settings.gateway_cpus)
    return gateway(GatewayReplica).bind(
        config,
        address,
        encoder(EncoderReplica).bind(config, address),
        llm(LLMReplica).bind(config, address),
    )


def _deployment(
    name: str, settings: ServeConfig, replicas: int = 1, threads: int = 1, num_cpus: float = 0, num_gpus: float = 0
) -> Callable[[type], Deployment]:
    # OpenMP takes its number of threads from the environment in every thread that asks for none by itself.
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return serve.deployment(
        name=name,
        num_replicas=replicas,
        max_ongoing_requests=settings.max_sessions + SPARE_REQUESTS,
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": environment},
        },
    )


def redis_url(config: Config) -> str | None:
    """The address of a Redis that is there already, if one is named."""
    return config.section("bus", BusConfig).url or os.environ.get("REDIS_URL") or None


@contextmanager
def running(config: Config, log_to_driver: bool = False) -> Iterator[str]:
    """Everything up, as a base URL; everything down afterwards. Raises StartError."""
    settings = config.section("serve", ServeConfig)
    if not is_loopback(settings.host) and not os.environ.get(API_KEY_VARIABLE):
        raise StartError(
            f"serve.host is {settings.host}, which others can reach: "
            f"set {API_KEY_VARIABLE} to a secret that clients must send, or keep to 127.0.0.1"
        )
    with ExitStack() as stack:
        port = _free_port(settings.host, settings.port)
        redis = redis_url(config) or stack.enter_context(RedisServer())
        _start_ray(settings, log_to_driver)
        stack.callback(ray.shutdown)
        logging.getLogger("ray.serve").setLevel(logging.INFO if log_to_driver else logging.WARNING)
        serve.start(http_options={"host": settings.host, "port": port, "request_timeout_s": None})
        stack.callback(serve.delete, APPLICATION)  # replicas release their leases and close their sockets
        try:
            serve.run(assemble(config, redis), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise StartError(f"the application did not start: {_why(error)}") from None
        yield f"http://{settings.host}:{port}"


def _start_ray(settings: ServeConfig, log_to_driver: bool) -> None:
    """Join the cluster of RAY_ADDRESS, else start one on this machine's loopback that ends with this program."""
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=log_to_driver, logging_level=logging.WARNING)
        return
    local_ray_environment()
    # Ray took this one from the environment when it was imported, before we could set it.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
    needed = (
        settings.gateways * settings.gateway_cpus
        + settings.encoders * settings.encoder_cpus
        + settings.llms * settings.llm_cpus
    )
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, round(needed + 0.5)),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=log_to_driver,
        logging_level=logging.WARNING,
    )


def _free_port(host: str, port: int) -> int:
    """`port` itself when it can be listened on, any free one for 0. Raises StartError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port} ({error.strerror}): give another serve.port") from None
        free: int = probe.getsockname()[1]
        return free


def _why(error: BaseException) -> str:
    """The last line that says something: Serve puts a replica's whole traceback into its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def raise_on_sigterm() -> None:
    """A polite kill ends the program like Ctrl-C does: by an exception that runs every `finally`."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def main(arguments: list[str] | None = None) -> int:
    """Keep the application up until Ctrl-C or SIGTERM. Exit status 1 when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m serve.app", description="Serve a model until Ctrl-C.")
    parser.add_argument("config", nargs="?", default=str(REPOSITORY / "configs/embedded.yaml"))
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    raise_on_sigterm()
    try:
        with running(load_config(options.config, options.overrides), log_to_driver=True) as url:
            print(f"ready: {url} (WebSocket {url.replace('http', 'ws', 1)}/v1/realtime); Ctrl-C ends it", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 130
    except (ConfigError, StartError, BusError, RedisServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
