"""The application: `python -m serve.app configs/embedded.yaml` keeps it up, `serve run configs/serve.yaml` too.

`build` puts the deployments together; `running` is the whole of it for programs that start
everything themselves: Redis, Ray, the application, and their end in reverse order.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.serve import Application, Deployment

from actors.bus import Bus, BusConfig, BusError
from actors.config import Config, ConfigError, load_config
from actors.redis_server import RedisServer, RedisServerError
from serve import cluster, proxy
from serve.autoscaling import EncoderPolicy, LLMPolicy, ScalingConfig
from serve.deployments import EncoderReplica, GatewayReplica, LLMReplica, RedisReplica
from serve.gateway import ServeConfig
from serve.keys import API_KEY_VARIABLE, API_KEYS_FILE_VARIABLE, ApiKeys, KeysError, is_loopback
from serve.limits import LimitsConfig
from serve.signals import Stopped, end_at_once_on_signal, interruptible
from serve.url_guard import SourcesConfig

log = logging.getLogger(__name__)

APPLICATION = "videollm"
MANY_REQUESTS = 1 << 20  # a WebSocket holds one request slot for its life: the gateway's own limits come first
CONSTRUCTOR_TRIES = 2  # a wrong setting stays wrong: Serve's default of 20 tries takes minutes to say so
HEALTH_CHECK_PERIOD_S = 2  # a dead loop must not go unnoticed for Serve's default of 10 s
METRICS_S = 1.0  # how often replicas tell what autoscaling goes by
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
UNUSED_PORTS = range(20_000, 32_000)  # above those of Ray's workers, below those the system hands out
REPOSITORY = Path(__file__).parents[1]


class AppArgs(BaseModel):
    """What `serve run` passes on from the `args` of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    config: str = "configs/embedded.yaml"
    overrides: list[str] = []


class StartError(RuntimeError):
    """The application cannot start; says what to change."""


def build(args: dict[str, object]) -> Application:
    """The application for `serve run` and `serve deploy`; Redis is the address given or one of its own.

    `args` are those of AppArgs. Raises ValueError (ConfigError, pydantic's ValidationError) for wrong settings.
    """
    given = AppArgs.model_validate(args)
    path = Path(given.config)
    config = load_config(path if path.is_file() else REPOSITORY / path, given.overrides)
    return assemble(config, redis_url(config))


def assemble(config: Config, redis: str | None) -> Application:
    """Gateway in front of encoder and LLM, each a deployment of its own with processes of its own."""
    settings = config.section("serve", ServeConfig)
    address = redis or _deployment("redis", settings)(RedisReplica).bind()
    encoder = _deployment(
        "encoder",
        settings,
        Replicas(settings.encoders, settings.max_encoders, EncoderPolicy),
        settings.encoder_cpus,
        settings.encoder_gpus,
    )
    llm = _deployment(
        "llm", settings, Replicas(settings.llms, settings.max_llms, LLMPolicy), settings.llm_cpus, settings.llm_gpus
    )
    gateway = _deployment("gateway", settings, Replicas(settings.gateways), settings.gateway_cpus)
    return gateway(GatewayReplica).bind(
        config,
        address,
        encoder(EncoderReplica).bind(config, address),
        llm(LLMReplica).bind(config, address),
    )


@dataclass(frozen=True)
class Replicas:
    """How many of a deployment: a number, or as many as `policy` wants between two."""

    least: int = 1
    most: int | None = None
    policy: type | None = None

    def autoscaling(self, scaling: ScalingConfig) -> dict[str, object] | None:
        """As Serve's setting; None for a fixed number."""
        if self.most is None or self.policy is None:
            return None
        policy = f"{self.policy.__module__}:{self.policy.__qualname__}"
        return {
            "min_replicas": self.least,
            "max_replicas": max(self.least, self.most),
            "initial_replicas": self.least,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "metrics_interval_s": METRICS_S,
            "look_back_period_s": 2 * METRICS_S,
            "policy": {"policy_function": policy, "policy_kwargs": scaling.model_dump()},
        }


def _deployment(
    name: str, settings: ServeConfig, replicas: Replicas | None = None, num_cpus: float = 0, num_gpus: float = 0
) -> Callable[[type], Deployment]:
    replicas = replicas or Replicas()
    autoscaling = replicas.autoscaling(settings.scaling)
    return ray_serve.deployment(
        name=name,
        num_replicas=None if autoscaling else replicas.least,
        autoscaling_config=autoscaling,
        max_ongoing_requests=MANY_REQUESTS,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
    )


def redis_url(config: Config) -> str | None:
    """The address of a Redis that is there already, if one is named."""
    return config.section("bus", BusConfig).url or os.environ.get("REDIS_URL") or None


@contextmanager
def running(config: Config, log_to_driver: bool = False) -> Iterator[str]:
    """Everything up, as a base URL; everything down afterwards. Raises StartError."""
    settings = config.section("serve", ServeConfig)
    limits = config.section("limits", LimitsConfig)
    config.section("sources", SourcesConfig)
    if not ApiKeys.from_environment() and not is_loopback(settings.host):
        raise StartError(
            f"serve.host is {settings.host}, which others can reach: set {API_KEY_VARIABLE} to a secret that "
            f"clients must send, or {API_KEYS_FILE_VARIABLE} to a file of them, or keep to 127.0.0.1"
        )
    port = _free_port(settings.host, settings.port)
    os.environ.setdefault(proxy.VARIABLE, proxy.IMPORT_PATH)
    os.environ.setdefault(proxy.SEND_S_VARIABLE, str(limits.send_s))
    os.environ.setdefault(proxy.HEADERS_S_VARIABLE, str(limits.headers_s))
    end_at_once_on_signal()
    with ExitStack() as stack:
        redis = redis_url(config) or stack.enter_context(RedisServer())
        asyncio.run(_check_redis(config, redis))
        cluster.start(_cpus(settings), log_to_driver)
        stack.callback(ray.shutdown)
        if "RAY_ADDRESS" not in os.environ:  # a cluster of others may grow
            check_gpus(settings, ray.cluster_resources().get("GPU", 0.0))
        logging.getLogger("ray.serve").setLevel(logging.INFO if log_to_driver else logging.WARNING)
        try:
            ray_serve.start(http_options={"host": settings.host, "port": port, "request_timeout_s": None})
            stack.callback(ray_serve.delete, APPLICATION)  # replicas release their leases and close their sockets
            ray_serve.run(assemble(config, redis), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise StartError(f"the application did not start: {_why(error)}") from None
        yield f"http://{settings.host}:{port}"


async def _check_redis(config: Config, url: str) -> None:
    """Raises BusError now for a Redis that cannot be used: replicas would take half a minute to say so."""
    bus = await Bus.connect(config.section("bus", BusConfig), url)
    await bus.close()


def _cpus(settings: ServeConfig) -> int:
    """Logical CPUs of our own cluster: those of the machine, more where the replicas would not fit."""
    reserved = (
        settings.gateways * settings.gateway_cpus
        + max(settings.encoders, settings.max_encoders or 0) * settings.encoder_cpus
        + max(settings.llms, settings.max_llms or 0) * settings.llm_cpus
    )
    return max(os.cpu_count() or 1, math.ceil(reserved))


def check_gpus(settings: ServeConfig, there: float) -> None:
    """Raises StartError for a machine with too few GPUs: Serve would wait for them for ever."""
    wanted = settings.encoders * settings.encoder_gpus + settings.llms * settings.llm_gpus
    if wanted > there:
        raise StartError(
            f"serve.encoder_gpus and serve.llm_gpus ask for {wanted:g} GPUs, this machine has {there:g}: give a "
            "settings file that sets both to 0 and encoder.device and engine.device to cpu, or a machine with a GPU"
        )


def _free_port(host: str, port: int) -> int:
    """`port` itself when it can be listened on, any free one for 0. Raises StartError."""
    candidates = [port] if port else random.sample(UNUSED_PORTS, 20)
    for candidate in candidates:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                reason = error.strerror
            else:
                return candidate
    raise StartError(f"cannot listen on {host}:{port} ({reason}): give another serve.port")


def _why(error: BaseException) -> str:
    """What the replicas that failed said last: Serve itself only names their deployments."""
    said = []
    status = ray_serve.status().applications.get(APPLICATION)
    for name, deployment in (status.deployments if status else {}).items():
        if deployment.status in FAILED:
            said.append(f"{name}: {_last_line(deployment.message)}")
    return "; ".join(said) or _last_line(str(error))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"


def main(arguments: list[str] | None = None) -> int:
    """Keep the application up until Ctrl-C or SIGTERM. Exit status 1 when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m serve.app", description="Serve a model until Ctrl-C.")
    parser.add_argument("config", nargs="?", help="settings file (default: configs/embedded.yaml)")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument(
        "--checkpoint",
        help="a folder or a hub name; its settings replace the model section, "
        "and without a settings file those of a published adapter are taken from configs/",
    )
    options = parser.parse_args(arguments)
    end_at_once_on_signal()
    try:
        config = _asked_for(options)
        print(f"settings: {config.source}", flush=True)
        with running(config, log_to_driver=True) as url:
            print(f"cluster: RAY_ADDRESS={ray.get_runtime_context().gcs_address} for python -m serve.drain", flush=True)
            print(f"ready: {url} (WebSocket {url.replace('http', 'ws', 1)}/v1/realtime); Ctrl-C ends it", flush=True)
            asyncio.run(interruptible(asyncio.Event().wait()))
    except Stopped as stopped:
        return stopped.status
    except (ConfigError, KeysError, StartError, BusError, RedisServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _asked_for(options: argparse.Namespace) -> Config:
    """The settings of a command line. Raises ConfigError, and StartError for a checkpoint that cannot be served."""
    config = load_config(options.config or REPOSITORY / "configs/embedded.yaml", options.overrides)
    if options.checkpoint is None:
        return config
    from serve.checkpoints import serving  # imports torch, which a program without a checkpoint does not need

    try:
        return serving(config, options.checkpoint, options.config is not None, options.overrides)
    except ValueError as error:
        raise StartError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
