"""Make the memory plan of a configuration: print it on demand, and refuse a run that the GPU cannot hold."""

from __future__ import annotations

from dataclasses import replace

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vessel.data.catalog import Catalog
from vessel.errors import VesselError
from vessel.memory_plan.advice import advice, gpu_size, require_room
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.plan import Images, MemoryPlan, Setup, memory_plan
from vessel.paths import expanded

AUTO = "auto"  # of activation_checkpointing: where the memory of the GPU needs it

_USUAL_GB = 24.0  # size to plan for where there is no GPU and none is named


def print_plan(config: DictConfig) -> None:
    """Print the plan of a training configuration and its verdict; neither data, weights nor a GPU are needed."""
    size = _size(config)
    gpu_gb = _USUAL_GB if size is None else size
    plan = _plan(config, gpu_gb)
    console = Console()
    console.print(plan.table())
    console.print(plan.verdict(gpu_gb), markup=False, highlight=False)
    if not plan.fits(gpu_gb):
        console.print(advice(plan, gpu_gb), soft_wrap=True, markup=False, highlight=False)


def require_memory(config: DictConfig) -> MemoryPlan | None:
    """Refuse a training configuration that the GPU cannot hold.

    Returns:
        the plan, whose setup holds what `activation_checkpointing=auto` comes to; None where there is nothing to judge
        by: on the CPU without `gpu_gb`.

    Raises:
        VesselError: it does not fit, and `force` is not given; the message lists settings that would help.
    """
    size = _size(config)
    if size is None:
        return None
    plan = _plan(config, size)
    if not config.force:
        require_room(plan, size)
    return plan


def _plan(config: DictConfig, gpu_gb: float) -> MemoryPlan:
    """Plan a configuration; with `activation_checkpointing=auto` layers are computed again where it fits only so."""
    plan = memory_plan(setup_of(config))
    if config.activation_checkpointing != AUTO or plan.fits(gpu_gb):
        return plan
    try:
        saving = memory_plan(replace(plan.setup, activation_checkpointing=True), like=plan)
    except VesselError:  # this network cannot
        return plan
    return saving if saving.fits(gpu_gb) or config.force else plan


def setup_of(config: DictConfig) -> Setup:
    """Read the settings that decide about memory from a training configuration, and of the data what is known."""
    sizes = instantiate(config.model)
    setup = Setup(
        sizes=sizes,
        lora=instantiate(config.lora),
        trainable=config.trainable,
        loss_function=instantiate(config.loss),
        engine=Engine.of(OmegaConf.to_container(config.trainer, resolve=True)),  # type: ignore[arg-type]  # a mapping
        activation_checkpointing=config.activation_checkpointing is True,
        batch_size=config.data.batch_size,
    )
    return _with_images(setup, config.data)


def _with_images(setup: Setup, data: DictConfig) -> Setup:
    """Add the number of phrases, and of an existing data set the size of the image with most tiles, then pixels."""
    given = None if data.phrases is None else 1 if isinstance(data.phrases, str) else len(data.phrases)
    root = None if OmegaConf.is_missing(data, "root") else expanded(data.root)
    if root is None or not (root / "manifest.json").is_file():
        return replace(setup, images=replace(setup.images, phrases=given or setup.images.phrases))
    catalog = Catalog.open(root)
    phrases = len(catalog.phrases) if given is None else given
    candidates = [
        replace(setup, images=Images((height, width), phrases))
        for height, width in {(frame.height, frame.width) for frame in catalog.frames.values()}
    ]
    return max(candidates, key=lambda one: (one.tiles, one.images.size[0] * one.images.size[1]))


def _size(config: DictConfig) -> float | None:
    if config.gpu_gb is not None:
        return float(config.gpu_gb)
    if config.trainer.accelerator == "cpu":
        return None
    devices = config.trainer.devices
    return gpu_size(devices if isinstance(devices, int) and devices > 0 else None)
