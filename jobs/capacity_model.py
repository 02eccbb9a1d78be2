"""How many machines so many streams need: arithmetic over costs of a frame, a session and a machine.

A stream sends `fps` frames a second. Each is encoded once (arithmetic), appended to its session's
context (arithmetic; weights are read once a step, the session's keys and values once a frame), and
kept in Redis until the context's window has moved on. Now and then the model speaks, and now and
then a window is built anew. Numbers of one device are bounds of a roofline times what share of them
is reached; docs/capacity.md says which are measured and which are taken from data sheets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field, model_validator

from actors.config import Section

RESERVE_GB = 4.0  # of a device's memory: activations, the framework, fragments


class LoadConfig(Section):
    """What one stream asks for."""

    fps: float = Field(default=2, gt=0, description="frames a second that are admitted")
    image_kb: float = Field(default=40, gt=0, description="one compressed picture as it comes in")
    responses_per_minute: float = Field(default=4, ge=0, description="how often the model speaks")
    response_tokens: float = Field(default=20, ge=0, description="tokens of one response")
    queued_frames: float = Field(default=2, ge=0, description="pictures of a stream that wait in Redis for an encoder")


class ServedConfig(Section):
    """The models; the defaults are Llama-3-8B in bfloat16 behind SigLIP-L/16-384, 10 tokens and a comma a frame."""

    parameters: float = Field(default=7.5e9, gt=0, description="of the LLM without its embedding table")
    weights_gb: float = Field(default=16.1, gt=0, description="of the LLM, read once a step")
    layers: int = Field(default=32, gt=0)
    width: int = Field(default=4096, gt=0)
    kv_bytes: float = Field(default=131_072, gt=0, description="keys and values of one position")
    frame_positions: float = Field(default=11, gt=0, description="positions of a frame, separator included")
    frame_tokens_bytes: float = Field(default=20_480, gt=0, description="a frame's tokens in Redis: tokens x width x 2")
    encoder_gflop: float = Field(default=384, gt=0, description="to encode one frame")
    window: int = Field(default=4096, gt=0, description="positions at which a context is built anew")
    kept: int = Field(default=2048, gt=0, description="positions it is built anew with")

    @model_validator(mode="after")
    def _window_moves(self) -> ServedConfig:
        if self.kept >= self.window:
            raise ValueError(f"kept is {self.kept}, window {self.window}: a window keeps less than it holds")
        return self


class MachineConfig(Section):
    """What machines can do and cost. The defaults are an H100 SXM's data sheet, and shares that are estimates."""

    name: str = "H100"
    tflops: float = Field(default=989, gt=0, description="bfloat16, dense, peak")
    bandwidth_gb_s: float = Field(default=3350, gt=0)
    memory_gb: float = Field(default=80, gt=0)
    encoder_reached: float = Field(default=0.4, gt=0, le=1, description="share of the peak that encoding reaches")
    llm_reached: float = Field(default=0.4, gt=0, le=1, description="share of the peak that the LLM's steps reach")
    bandwidth_reached: float = Field(default=0.7, gt=0, le=1, description="share of the memory's bandwidth")
    busy: float = Field(default=0.7, gt=0, le=1, description="load to plan for; the rest is for bursts and takeovers")
    step_positions: int = Field(default=2048, gt=0, description="engine.token_budget")
    steps_per_s: float = Field(default=10, gt=0, description="at least so many, whatever a step holds: bounds the lag")
    spare: int = Field(default=1, ge=0, description="devices of each kind beyond the need, for one that fails")
    gpu_price: float = Field(default=2.5, ge=0, description="of a device and hour, in any currency")
    cpu_price: float = Field(default=0.05, ge=0, description="of a core and hour")
    memory_price: float = Field(default=0.005, ge=0, description="of a GB of Redis memory and hour")
    shard_gb: float = Field(default=24, gt=0, description="maxmemory of one Redis server")
    decode_ms: float = Field(default=4, ge=0, description="core time to decode a picture, at the encoder")
    gateway_ms: float = Field(default=3, gt=0, description="core time of a gateway for a frame, the bus's share apart")
    gateway_cores: int = Field(default=4, gt=0, description="of one gateway machine; a gateway replica uses one")


@dataclass(frozen=True)
class RedisCosts:
    """What the bus costs (jobs/capacity_redis.py measures it). Core times in microseconds a frame, memory in bytes.

    `server_us` is the server's for a frame's whole way; `gateway_us`, `encoder_us` and `owner_us` are the clients';
    `announce_us` the server's for one announcement to one encoder and `hear_us` the encoder's for hearing it.
    """

    server_us: float
    gateway_us: float
    encoder_us: float
    owner_us: float
    announce_us: float
    hear_us: float
    session_bytes: float
    input_overhead_bytes: float
    queued_overhead_bytes: float
    log_entry_bytes: float

    def session_memory(self, load: LoadConfig, served: ServedConfig) -> float:
        """Bytes of a session at its fullest, just before its window moves."""
        frames = served.window / served.frame_positions
        spoken = frames / load.fps * load.responses_per_minute / 60 * load.response_tokens
        queued = load.queued_frames * (load.image_kb * 1000 + self.queued_overhead_bytes)
        window = frames * (served.frame_tokens_bytes + self.input_overhead_bytes)
        return self.session_bytes + window + (frames + spoken) * self.log_entry_bytes + queued


@dataclass(frozen=True)
class DeviceShare:
    """What one stream takes of an LLM device a second: shares of its time, and of its memory."""

    arithmetic: float
    bandwidth: float
    memory: float

    def streams(self, weights_share: float, busy: float) -> tuple[int, str]:
        """Most streams of a device, and what bounds them; reading weights takes `weights_share` of its time.

        Arithmetic and reading take turns, as in jobs/capacity_check.py, which a benchmark bears out.
        """
        in_time, in_memory = max(busy - weights_share, 0) / (self.arithmetic + self.bandwidth), 1 / self.memory
        if in_memory <= in_time:
            return int(in_memory), "KV memory"
        return int(in_time), "arithmetic" if self.arithmetic > self.bandwidth else "bandwidth"


@dataclass(frozen=True)
class Plan:
    """The machines for `streams` streams. Gigabytes are 1e9 bytes, rates are a second's."""

    streams: int
    frames_per_s: float
    cells: int
    encoders: int
    llms: int
    llm_bound: str
    streams_per_llm: int
    frames_per_encoder: float
    redis_gb: float
    redis_shards: int
    redis_bound: str
    gateways: int
    decode_cores: int
    ingress_gbit_s: float
    redis_gbit_s: float
    price_per_hour: float

    @property
    def price_per_stream_hour(self) -> float:
        return self.price_per_hour / self.streams


def flop_of_position(served: ServedConfig, context: float) -> float:
    """Arithmetic for one position behind `context` others."""
    return 2 * served.parameters + 4 * served.layers * served.width * context


def llm_share(load: LoadConfig, served: ServedConfig, machine: MachineConfig) -> DeviceShare:
    """Of one device, for one stream."""
    responses = load.responses_per_minute / 60
    spoken = responses * load.response_tokens
    appended = load.fps * served.frame_positions + spoken
    rebuilt = appended * served.kept / (served.window - served.kept)
    context = (served.window + served.kept) / 2
    read = (load.fps + spoken) * context * served.kv_bytes
    free = (machine.memory_gb - RESERVE_GB - served.weights_gb) * 1e9
    if free <= served.window * served.kv_bytes:
        raise ValueError(
            f"a {machine.name} with {machine.memory_gb:g} GB has no room for {served.weights_gb:g} GB of weights and "
            f"one context of {served.window} positions: a larger device, or a smaller window"
        )
    return DeviceShare(
        (appended + rebuilt) * flop_of_position(served, context) / (machine.tflops * 1e12 * machine.llm_reached),
        read / (machine.bandwidth_gb_s * 1e9 * machine.bandwidth_reached),
        served.window * served.kv_bytes / free,
    )


def streams_per_llm(load: LoadConfig, served: ServedConfig, machine: MachineConfig) -> tuple[int, str]:
    """Of one device, and what bounds them: steps come as often as the budget fills, and at least `steps_per_s`."""
    share = llm_share(load, served, machine)
    read_s = served.weights_gb / (machine.bandwidth_gb_s * machine.bandwidth_reached)
    positions = _positions_per_s(load, served)
    count, bound = share.streams(machine.steps_per_s * read_s, machine.busy)
    while count and (steps := count * positions / machine.step_positions) > machine.steps_per_s:
        fewer, its_bound = share.streams(steps * read_s, machine.busy)
        if fewer >= count:
            break
        count, bound = max(fewer, count - 1), its_bound  # fewer streams fill fewer steps: come down slowly
    return count, bound


def frames_per_encoder(served: ServedConfig, machine: MachineConfig) -> float:
    """A second, of one device."""
    return machine.tflops * 1e3 * machine.encoder_reached * machine.busy / served.encoder_gflop


def cell_frames_per_s(costs: RedisCosts, machine: MachineConfig) -> float:
    """What one application can take: every encoder hears of every frame, in one thread, beside its other work."""
    return machine.busy / 2 * 1e6 / costs.hear_us


def plan(streams: int, load: LoadConfig, served: ServedConfig, machine: MachineConfig, costs: RedisCosts) -> Plan:
    """The machines for that many streams at once. Raises ValueError where a device cannot hold one."""
    frames = streams * load.fps
    cells = max(1, math.ceil(frames / cell_frames_per_s(costs, machine)))
    each = streams / cells
    per_llm, bound = streams_per_llm(load, served, machine)
    if not per_llm:
        raise ValueError(f"a {machine.name} is too slow for one stream of {load.fps:g} frames a second: {bound}")
    if (by_core := int(machine.busy * 1e6 / (load.fps * costs.owner_us))) < per_llm:
        per_llm, bound = max(by_core, 1), "the replica's core"
    per_encoder = frames_per_encoder(served, machine)
    encoders = cells * (math.ceil(each * load.fps / per_encoder) + machine.spare)
    llms = cells * (math.ceil(each / per_llm) + machine.spare)
    memory = streams * costs.session_memory(load, served)
    announced = costs.announce_us * encoders / cells
    shards = {
        "memory": memory / cells / (machine.shard_gb * 1e9 / 1.5),
        "core": each * load.fps * (costs.server_us + announced) / (machine.busy * 1e6),
    }
    redis_bound = max(shards, key=lambda name: shards[name])
    redis_shards = cells * max(1, math.ceil(shards[redis_bound]))
    gateway_us = machine.gateway_ms * 1000 + costs.gateway_us
    gateways = cells * (
        math.ceil(each * load.fps * gateway_us / (1e6 * machine.busy * machine.gateway_cores)) + machine.spare
    )
    decode_cores = math.ceil(frames * (machine.decode_ms / 1000 + costs.encoder_us / 1e6) / machine.busy)
    moved = 2 * load.image_kb * 1000 + 2 * served.frame_tokens_bytes
    price = (
        (encoders + llms) * machine.gpu_price
        + (gateways * machine.gateway_cores + decode_cores) * machine.cpu_price
        + redis_shards * machine.shard_gb * machine.memory_price
    )
    return Plan(
        streams,
        frames,
        cells,
        encoders,
        llms,
        bound,
        per_llm,
        per_encoder,
        memory / 1e9,
        redis_shards,
        redis_bound,
        gateways,
        decode_cores,
        frames * load.image_kb * 8e3 / 1e9,
        frames * moved * 8 / 1e9,
        price,
    )


def _positions_per_s(load: LoadConfig, served: ServedConfig) -> float:
    appended = load.fps * served.frame_positions + load.responses_per_minute / 60 * load.response_tokens
    return appended * served.window / (served.window - served.kept)
