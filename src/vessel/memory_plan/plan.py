"""The memory plan: bytes that training takes of each GPU, known before a GPU or a weight is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from rich.table import Table

from vessel.batch import Batch
from vessel.data.prompt import ANSWERS, QUESTIONS, Prompt
from vessel.data.transforms import tile_count
from vessel.losses import Loss
from vessel.memory_plan.engine import PARAMETERS, Engine
from vessel.memory_plan.gathering import gathered_elements
from vessel.memory_plan.step import Step, run_step
from vessel.model.groups import choose_trainable
from vessel.model.lora import Lora, add_lora
from vessel.model.network import Network, NetworkConfig

GB = 2**30  # graphics memory is sold in these
GATHERED, CONTEXT, GAPS = "gathered layers", "CUDA context and libraries", "gaps between blocks"
# Not measured here: what a process takes of a GPU before its first tensor, the buffers of NCCL, and the fraction of
# what comes and goes that the allocator cannot use again.
_CONTEXT, _NCCL, _GAPS = int(0.6 * GB), int(0.4 * GB), 0.05
_SMALL = 0.002  # fraction of the total below which a part has no row of its own


@dataclass(frozen=True)
class Images:
    """The properties of the data that decide about memory.

    Attributes:
        size: largest native (H, W).
        phrases: of an image.
    """

    size: tuple[int, int] = (512, 512)
    phrases: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Return phrases that stand for those of the data."""
        return tuple(f"blood vessel {i}" for i in range(self.phrases))


@dataclass(frozen=True)
class Setup:
    """Everything that decides about memory.

    Attributes:
        sizes, lora, trainable, activation_checkpointing: of the network, as in `NetworkPlan`.
        loss_function: mask loss.
        engine: precision, ranks and how training is spread over them.
        batch_size: images a step on each GPU.
        images: of the data set.
    """

    sizes: NetworkConfig
    lora: Lora
    trainable: str
    loss_function: Loss
    engine: Engine
    activation_checkpointing: bool = False
    batch_size: int = 1
    images: Images = field(default_factory=Images)

    @property
    def tiles(self) -> int:
        """Return the number of tiles of the largest image, thumbnail counted."""
        height, width = self.images.size
        return tile_count(width, height, self.sizes.geometry)


@dataclass(frozen=True)
class MeasuredStep:
    """A step of a network without content, and the memory that it takes.

    Attributes:
        network: without content, in the dtypes of training.
        step: of that network.
        tokens: of a conversation.
    """

    network: Network
    step: Step
    tokens: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU at the fullest moment.

    Attributes:
        setup: what was planned.
        rows: bytes by part, in the order of the table; they add up to `total`.
        moment: what runs then.
        host: bytes of each rank in the memory of its host, of what is offloaded.
        measured: the step that the plan rests on.
    """

    setup: Setup
    rows: Mapping[str, int]
    moment: str
    host: int
    measured: MeasuredStep = field(repr=False)

    @property
    def total(self) -> int:
        """Return the bytes that a GPU must have."""
        return sum(self.rows.values())

    @property
    def gigabytes(self) -> float:
        """Return `total` in GB of 2^30 bytes."""
        return self.total / GB

    def fits(self, gpu_gb: float) -> bool:
        """Return True if a GPU of that size has room for it."""
        return self.gigabytes <= gpu_gb

    def verdict(self, gpu_gb: float) -> str:
        """Return one line, such as `fits: 18.3 of 24.0 GB`."""
        if self.fits(gpu_gb):
            return f"fits: {self.gigabytes:.1f} of {gpu_gb:.1f} GB"
        return f"does not fit: {self.gigabytes:.1f} GB on a GPU of {gpu_gb:.1f} GB"

    def table(self) -> Table:
        """Return the table of the parts, for the terminal."""
        setup, engine = self.setup, self.setup.engine
        spread = f"ZeRO-{engine.stage} on {engine.ranks}" if engine.stage else f"{engine.ranks}, each with the network"
        height, width = setup.images.size
        facts = [
            f"at the fullest moment: {self.moment}",
            f"GPUs: {spread}, {engine.precision}",
            f"activation_checkpointing={str(setup.activation_checkpointing).lower()}",
            f"a GPU's batch: {setup.batch_size} x ({width} x {height} px, {setup.tiles} tile(s), "
            f"{setup.images.phrases} phrase(s), {self.measured.tokens} tokens)",
            f"frames of {setup.sizes.geometry.frame_size} px",
        ]
        if self.host:
            facts.append(f"in the host's memory, for each GPU: {self.host / GB:.1f} GB")
        table = Table(title="memory of each GPU", caption="\n".join(facts), caption_justify="left")
        table.add_column("part", min_width=66)
        table.add_column("GB", justify="right")
        small = {part for part, nbytes in self.rows.items() if nbytes < _SMALL * self.total}
        for part, nbytes in self.rows.items():
            if part not in small:
                table.add_row(part, f"{nbytes / GB:.2f}")
        if small:
            table.add_row("the rest", f"{sum(self.rows[part] for part in small) / GB:.2f}")
        table.add_section()
        table.add_row("total", f"{self.gigabytes:.2f}")
        return table


def memory_plan(setup: Setup, *, like: MemoryPlan | None = None) -> MemoryPlan:
    """Plan a run: its network is built without content and takes one step.

    Args:
        setup: what to plan.
        like: a plan whose measured step is used again where nothing that decides about it differs.

    Raises:
        VesselError: a choice of `lora` or `trainable` that does not exist.
    """
    measured = like.measured if like is not None and _has_same_step(setup, like.setup) else _measure(setup)
    engine, step = setup.engine, measured.step
    states = engine.states(measured.network)
    in_step = dict(states.in_step)
    if engine.stage == 3:
        in_step[GATHERED] = gathered_elements(step.order, engine) * engine.dtype.itemsize
    moments = {step.moment: _sum(in_step, step.fullest), "optimizer step": states.in_update}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    rows = _sum(states.held, moments[moment])
    ordered = dict(sorted(rows.items(), key=lambda row: (row[0] != PARAMETERS, -row[1])))
    ordered[CONTEXT] = _CONTEXT + (_NCCL if engine.ranks > 1 else 0)
    ordered[GAPS] = int(_GAPS * sum(moments[moment].values()))
    return MemoryPlan(setup, ordered, moment, states.host, measured)


def _measure(setup: Setup) -> MeasuredStep:
    prompt = Prompt()  # questions and answers are of nearly the same length with every tokenizer
    network = _network(setup, prompt)
    batch = batch_of(setup, prompt)
    step = run_step(network, batch, setup.loss_function, setup.engine.step_settings)
    return MeasuredStep(network, step, batch.input_ids.shape[1])


def _has_same_step(one: Setup, other: Setup) -> bool:
    a, b = one.engine, other.engine
    return a.step_settings == b.step_settings and a.dtype == b.dtype and replace(one, engine=b) == other


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def _network(setup: Setup, prompt: Prompt) -> Network:
    with torch.device("meta"):
        network = setup.sizes.build(prompt.token_ids, setup.images.names)
        if setup.lora.r > 0:
            add_lora(network, setup.lora, new_tokens=prompt.new_tokens, seg_is_trained=True)
    choose_trainable(network, setup.trainable)
    if setup.activation_checkpointing:
        network.checkpoint_activations()
    setup.engine.prepare(network)
    return network


def batch_of(setup: Setup, prompt: Prompt) -> Batch:
    """Build a batch of the largest images, with the longest question and answer and without pixels.

    Of several conversations all but the first have one token less, so that the batch is padded.
    """
    geometry, count, images = setup.sizes.geometry, setup.batch_size, setup.images
    questions = [max(QUESTIONS, key=len).format(phrase="blood vessel")] * images.phrases
    answers = [max(ANSWERS, key=len)] * images.phrases
    ids, labels = prompt.conversation(questions, answers, setup.tiles * geometry.tokens_per_tile)
    attention = torch.ones(count, len(ids), dtype=torch.bool)
    attention[1:, -1] = False
    names = tuple(str(i) for i in range(count))

    def pixels(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return Batch(
        ids=names,
        patients=names,
        videos=names,
        phrases=(images.names,) * count,
        sizes=(images.size,) * count,
        tiles=pixels(count * setup.tiles, 3, geometry.tile_size, geometry.tile_size),
        frames=pixels(count, 3, geometry.frame_size, geometry.frame_size),
        input_ids=ids.expand(count, -1),
        attention_mask=attention,
        labels=labels.expand(count, -1),
        masks=tuple(pixels(images.phrases, *images.size, dtype=torch.bool) for _ in range(count)),
    )
