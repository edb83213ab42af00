"""Check that a run fits a GPU; if not, list the settings that would help and by how much. Each is planned itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from vessel.errors import VesselError
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.plan import GB, MemoryPlan, Setup, memory_plan
from vessel.model.sa2va import Sa2VAConfig

FEWER_LIVE = 300_000_000
ZERO_GPUS = 4  # a test compares it with trainer.devices of conf/trainer/zero3.yaml
_RANKS = (64, 16)  # of adapters, the larger first
COARSER = " (coarser masks)"  # remark behind an option


def gpu_size(count: int | None = None) -> float | None:
    """Return the size of the smallest of the first `count` GPUs, or of all, in GB of 2^30 bytes; None without one."""
    indices = range(torch.cuda.device_count())[:count]
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in indices]
    return min(sizes) / GB if sizes else None


def require_room(plan: MemoryPlan, gpu_gb: float) -> None:
    """Refuse a run that a GPU of that size cannot hold.

    Raises:
        VesselError: it cannot; the message has the total, and what other settings would take.
    """
    if not plan.fits(gpu_gb):
        raise VesselError(
            f"{plan.verdict(gpu_gb)} on each GPU, fullest in the {plan.moment}. {advice(plan, gpu_gb)}\n"
            "plan=true shows the parts, gpu_gb=... judges by another size, force=true trains all the same"
        )


def advice(plan: MemoryPlan, gpu_gb: float) -> str:
    """Describe what each setting would take alone, the most helpful first; if none is enough, also several together."""
    helpful = []
    for option, setup in alternatives(plan.setup):
        try:
            other = memory_plan(setup, like=plan)
        except VesselError:  # this network has no such choice
            continue
        if other.total < plan.total:
            helpful.append((option, other))
    helpful.sort(key=lambda pair: pair[1].total)
    if not helpful:
        return "No setting would help: use GPUs with more memory or a smaller model"
    lines = [_line(option, other, plan, gpu_gb) for option, other in helpful]
    alone = "Settings that help, each alone:\n" + "\n".join(lines)
    return alone if helpful[0][1].fits(gpu_gb) else f"{alone}\n{_combine(helpful, gpu_gb)}"


def alternatives(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield other settings for the same task, each with its options as they are written on the command line."""
    engine, sizes, lora = setup.engine, setup.sizes, setup.lora
    if not setup.activation_checkpointing:
        yield "activation_checkpointing=true", replace(setup, activation_checkpointing=True)
    if setup.batch_size > 1:
        yield "data.batch_size=1", replace(setup, batch_size=1)
    if isinstance(sizes, Sa2VAConfig) and setup.tiles > 1:
        yield "model.max_tiles=1", replace(setup, sizes=replace(sizes, max_tiles=1))
    if lora.r > 0 and lora.tokens == "full":
        yield "lora.tokens=new", replace(setup, lora=replace(lora, tokens="new"))
    if smaller := next((r for r in _RANKS if r < lora.r), None):
        yield f"lora.r={smaller}", replace(setup, lora=replace(lora, r=smaller))
    if engine.precision.startswith("32"):
        yield "trainer.precision=bf16-mixed", replace(setup, engine=replace(engine, precision="bf16-mixed"))
    for option, other in _other_engines(engine):
        yield option, replace(setup, engine=other)
    if sizes.geometry.frame_size > 512:
        option, half = sizes.with_frame_size(sizes.geometry.frame_size // 2)
        yield f"{option}{COARSER}", replace(setup, sizes=half)


def _other_engines(engine: Engine) -> Iterator[tuple[str, Engine]]:
    sharded = replace(engine, precision="bf16-mixed", stage=3, ranks=max(engine.ranks, ZERO_GPUS))
    if engine.stage != 3:
        yield f"trainer=zero3 trainer.devices={sharded.ranks}", sharded
    elif engine.live > FEWER_LIVE:
        fewer = replace(engine, live=FEWER_LIVE)
        yield f"+trainer.strategy.zero.stage3_max_live_parameters={FEWER_LIVE}", fewer
    if not engine.offload_parameters:
        offloaded = replace(sharded, offload_optimizer=True, offload_parameters=True)
        yield f"trainer=zero3_offload trainer.devices={sharded.ranks}", offloaded
    if engine.stage > 1:
        yield f"trainer.devices={2 * engine.ranks}", replace(engine, ranks=2 * engine.ranks)


def _line(option: str, other: MemoryPlan, plan: MemoryPlan, gpu_gb: float) -> str:
    saved, ranks = (plan.total - other.total) / GB, other.setup.engine.ranks
    host = f", with {ranks * other.host / GB:.0f} GB of the host for all ranks" if other.host else ""
    return f"  {option}: {other.gigabytes:.1f} GB ({saved:.1f} less){', fits' if other.fits(gpu_gb) else ''}{host}"


def _combine(helpful: Sequence[tuple[str, MemoryPlan]], gpu_gb: float) -> str:
    """Take one helpful setting after another until the run fits, and describe the result."""
    (first, plan), *others = helpful
    taken = [first]
    for option, _ in others:
        setup = dict(alternatives(plan.setup)).get(option)  # what is taken already may leave nothing to change
        if setup is not None and not plan.fits(gpu_gb):
            taken.append(option)
            plan = memory_plan(setup, like=plan)
    if plan.fits(gpu_gb):
        return f"Together: {' '.join(taken)}: {plan.verdict(gpu_gb)}"
    return f"Not even all of them together are enough ({plan.verdict(gpu_gb)}): use larger GPUs or a smaller model"
