"""What the capacity model says, as tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from jobs.capacity_check import Checked
from jobs.capacity_model import LoadConfig, MachineConfig, Plan, RedisCosts, ServedConfig, plan
from jobs.capacity_redis import Comparison

POINTS = [round(10 ** (exponent / 8)) for exponent in range(8, 49)]
FPS = (1.0, 2.0, 4.0, 8.0)


def plan_table(
    plans: Sequence[Plan], load: LoadConfig, served: ServedConfig, machine: MachineConfig, costs: RedisCosts
) -> str:
    """A row a number of streams, and in words what bounds them."""
    first = plans[0]
    asked = f"{load.responses_per_minute:g} responses a minute of {load.response_tokens:g} tokens"
    lines = [
        f"{load.fps:g} frames a second, {asked}, "
        f"window {served.window} positions; {machine.name}, {machine.busy:.0%} busy, {machine.spare} spare",
        f"one LLM device: {first.streams_per_llm} streams (bound by {first.llm_bound}); one encoder device: "
        f"{first.frames_per_encoder:.0f} frames a second; one session in Redis: "
        f"{costs.session_memory(load, served) / 1e6:.1f} MB at its fullest",
        "",
        f"{'streams':>9} {'cells':>6} {'encoders':>9} {'LLMs':>7} {'Redis GB':>9} {'servers':>8} {'bound by':>9} "
        f"{'gateways':>9} {'decoding':>9} {'in Gbit/s':>10} {'Redis Gbit/s':>13} {'price/h':>10} {'a stream':>9}",
    ]
    lines += [
        f"{item.streams:>9} {item.cells:>6} {item.encoders:>9} {item.llms:>7} {item.redis_gb:>9.2f} "
        f"{item.redis_shards:>8} {item.redis_bound:>9} {item.gateways:>9} {item.decode_cores:>9} "
        f"{item.ingress_gbit_s:>10.2f} {item.redis_gbit_s:>13.2f} {item.price_per_hour:>10.2f} "
        f"{item.price_per_stream_hour:>9.4f}"
        for item in plans
    ]
    return "\n".join(lines)


def check_table(rows: Sequence[Checked]) -> str:
    """The formula beside the benchmark, and its largest errors."""
    lines = [f"{'a frame, ms':<28} {'formula':>9} {'measured':>9} {'error':>7}"]
    for row in rows:
        fitted = "" if row.fitted_tflop_s is None else f"  (fitted: {row.fitted_tflop_s:.3g} TFLOP/s)"
        lines.append(f"{row.what:<28} {row.predicted_ms:>9.1f} {row.measured_ms:>9.1f} {row.error:>7.0%}{fitted}")
    full = [abs(row.error) for row in rows if row.full and row.fitted_tflop_s is None]
    others = [abs(row.error) for row in rows if not row.full and row.fitted_tflop_s is None]
    lines.append(f"largest error in full steps {max(full, default=0):.0%}, elsewhere {max(others, default=0):.0%}")
    return "\n".join(lines)


def redis_table(costs: RedisCosts, checks: Sequence[Comparison], session_bytes: float) -> str:
    """The costs of the bus, and how well the formula for memory holds."""
    lines = [
        "core time of a frame, microseconds:",
        f"  Redis {costs.server_us:.0f}; gateway's bus {costs.gateway_us:.0f}; encoder's {costs.encoder_us:.0f}; "
        f"LLM replica's {costs.owner_us:.0f}",
        f"  an announcement, for each encoder: Redis {costs.announce_us:.1f}, the encoder {costs.hear_us:.1f}",
        "memory, bytes:",
        f"  a session {costs.session_bytes:.0f}; beside its tokens a frame {costs.input_overhead_bytes:.0f}; "
        f"beside its picture a queued frame {costs.queued_overhead_bytes:.0f}; "
        f"an entry of the log {costs.log_entry_bytes:.0f}",
        f"  a session at its fullest, as the settings say: {session_bytes / 1e6:.2f} MB",
    ]
    lines += [
        f"  {check.sessions} sessions of {check.frames} frames: formula {check.predicted / 1e6:.1f} MB, server "
        f"{check.measured / 1e6:.1f} MB, error {check.error:+.1%}"
        for check in checks
    ]
    return "\n".join(lines)


def draw(path: Path, load: LoadConfig, served: ServedConfig, machine: MachineConfig, costs: RedisCosts) -> None:
    """Devices, Redis memory and price of a stream against the number of streams, for several frame rates."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (devices, memory, price) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    plans = [plan(streams, load, served, machine, costs) for streams in POINTS]
    devices.loglog(POINTS, [item.llms for item in plans], label=f"LLMs ({plans[0].llm_bound})")
    devices.loglog(POINTS, [item.encoders for item in plans], label="encoders")
    devices.loglog(POINTS, [item.gateways for item in plans], label="gateway machines")
    devices.set(title=f"machines, {load.fps:g} FPS, {machine.name}", xlabel="streams", ylabel="machines")
    memory.loglog(POINTS, [item.redis_gb for item in plans], label="memory, GB")
    memory.loglog(POINTS, [item.redis_shards for item in plans], label="servers")
    memory.loglog(POINTS, [item.redis_gbit_s for item in plans], label="traffic, Gbit/s")
    memory.set(title="Redis", xlabel="streams")
    for fps in sorted({*FPS, load.fps}):
        other = load.model_copy(update={"fps": fps})
        prices = [plan(streams, other, served, machine, costs).price_per_stream_hour for streams in POINTS]
        price.loglog(POINTS, prices, label=f"{fps:g} FPS")
    price.set(title=f"price of a stream-hour, device at {machine.gpu_price:g}", xlabel="streams")
    for axes in (devices, memory, price):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
