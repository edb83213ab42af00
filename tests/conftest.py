"""Fixtures that several test modules share: tiny real networks, prompts and batches, and the optional shared data."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
torch.set_num_threads(1)

from vessel.batch import Batch, Sample, collate  # noqa: E402
from vessel.data.prompt import Prompt  # noqa: E402
from vessel.model.grounding import GroundingConfig  # noqa: E402
from vessel.model.lora import Lora  # noqa: E402
from vessel.model.mllm import LanguageConfig, VisionConfig  # noqa: E402
from vessel.model.sa2va import Sa2VAConfig  # noqa: E402
from vessel.weights.build import NetworkPlan  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIZES = Sa2VAConfig(
    LanguageConfig(width=32, layers=2, heads=4, kv_heads=2, mlp=64, vocabulary=512, context=2048),
    VisionConfig(tile_size=56, width=16, layers=1, heads=2, mlp=32),
    GroundingConfig(
        frame_size=64, embed_dim=8, heads=1, stages=(1, 2, 2, 1), windows=(4, 4, 4, 2), global_blocks=(4,), width=32,
        memory_width=8, memory_layers=1, memory_mlp=32,
    ),
    max_tiles=1,
)  # fmt: skip


def scripted(network, *scripts):
    """Make a network say ids, whatever it sees: each image of a batch its own. After them it speaks for itself."""
    scripts = [iter(ids) for ids in scripts]

    def speak(_module, _inputs, logits):
        logits = logits.clone()
        for row, script in zip(logits, scripts, strict=False):
            if (token := next(script, None)) is not None:
                row.zero_()[token] = 1
        return logits

    return network.mllm.lm_head.register_forward_hook(speak)


@pytest.fixture(scope="session")
def shared():
    """A folder or file of the data that lies beside a developer's checkout; skips where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"shared/{name} is not beside this checkout")
        return path

    return find


@pytest.fixture(scope="session")
def golden_folder(shared, tmp_path_factory):
    """Find the folder of a network that the public code ran: recorded, or beside a developer's checkout."""
    from tests.golden import unpack

    @cache
    def find(network: str) -> Path:
        if network.startswith("shared/"):
            return shared(network.removeprefix("shared/"))
        return unpack(network, tmp_path_factory.mktemp(network))

    return find


@pytest.fixture(scope="session")
def golden_network(golden_folder):
    """Open a network that the public code ran, once for all tests of a process: none of them may change it."""
    from tests.golden import open_golden

    return cache(lambda network: open_golden(golden_folder(network)))


@pytest.fixture(scope="session")
def prompt() -> Prompt:
    return Prompt()


@pytest.fixture(scope="session")
def random_augmentation():
    """Build the augmentation of data/augmentation=random, or a part of it: `random_augmentation(0, 1)` its flips."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from vessel.cli.conf import CONF

    def build(*positions: int):
        node = OmegaConf.load(Path(CONF) / "data/augmentation/random.yaml")
        if positions:
            node.transforms = [node.transforms[position] for position in positions]
        return instantiate(node, _convert_="all")

    return build


@pytest.fixture
def plan(prompt):
    """A plan for a network of a few thousand weights; keywords replace its fields."""

    def make(**changes) -> NetworkPlan:
        torch.manual_seed(0)
        fields = {"sizes": SIZES, "lora": Lora(r=0), "trainable": "all", **changes}
        return NetworkPlan(tokens=prompt.token_ids, new_tokens=prompt.new_tokens, **fields)

    return make


@pytest.fixture
def make_batch(prompt):
    """Random images whose masks are discs: `make_batch([["lumen"], ["lumen", "cap"]])` makes two."""

    def make(phrases: list[list[str]], *, size: tuple[int, int] = (48, 40), seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        geometry = SIZES.geometry
        samples = []
        for i, asked in enumerate(phrases):
            ids, labels = prompt.encode(asked, geometry.tokens_per_tile)
            y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
            disc = (y - size[0] / 2) ** 2 + (x - size[1] / 2) ** 2 < 100
            samples.append(
                Sample(
                    id=f"f{i}",
                    patient=f"p{i}",
                    video=f"p{i}_v1",
                    phrases=tuple(asked),
                    tiles=torch.randint(
                        0, 256, (1, 3, geometry.tile_size, geometry.tile_size), generator=generator, dtype=torch.uint8
                    ),
                    frame=torch.randint(
                        0, 256, (3, geometry.frame_size, geometry.frame_size), generator=generator, dtype=torch.uint8
                    ),
                    input_ids=ids,
                    labels=labels,
                    size=size,
                    masks=disc.expand(len(asked), *size).clone(),
                )
            )
        return collate(samples, prompt.token_ids.pad)

    return make


def _configuration(name: str, overrides: list[str]):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from vessel.cli.conf import CONF

    with initialize_config_dir(CONF, version_base="1.3"):
        return hydra_compose(name, overrides)


@pytest.fixture(scope="session")
def oct_set(tmp_path_factory) -> Path:
    """A painted data set of five patients, four frames each, made by `vessel.prepare`."""
    from omegaconf import OmegaConf

    from vessel.data.preparation import PrepareOptions, prepare

    out = tmp_path_factory.mktemp("data") / "oct"
    given = ["source=synthetic", f"out={out}", "workers=0", "folds=3"]
    painted = ["synthetic.patients=5", "synthetic.frames=4", "synthetic.size=64"]
    config = OmegaConf.merge(OmegaConf.structured(PrepareOptions), _configuration("prepare", given + painted))
    prepare(OmegaConf.to_object(config))
    return out


TINY_NETWORK = (
    "model.language.width=32", "model.language.mlp=64", "model.vision.tile_size=56", "model.vision.width=16",
    "model.vision.layers=1", "model.vision.heads=2", "model.vision.mlp=32", "model.grounding.frame_size=64",
    "model.grounding.embed_dim=8", "model.grounding.stages=[1,2,2,1]", "model.grounding.windows=[4,4,4,2]",
    "model.grounding.width=32", "model.grounding.memory_width=8", "model.grounding.memory_mlp=32",
)  # fmt: skip


@pytest.fixture(scope="session")
def train_tiny(oct_set):
    """Train a network of a few thousand weights for a few steps: `train_tiny(folder, "seed=1")` gives the best Dice."""
    from vessel.training.run import train

    def run(folder: Path, *overrides: str) -> float | None:
        settings = [
            "experiment=tiny", f"run={folder}", f"data.root={oct_set}", "data.phrases=[lumen,side branch]",
            "data.workers=0", "trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2",
            "trainer.log_every_n_steps=1", "+trainer.enable_progress_bar=false", "~callbacks.progress",
        ]  # fmt: skip
        return train(_configuration("train", [*settings, *TINY_NETWORK, *overrides]))

    return run


@pytest.fixture(scope="session")
def tiny_run(train_tiny, tmp_path_factory) -> Path:
    """The folder of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train_tiny(folder)
    return folder


@pytest.fixture
def compose():
    """A command's configuration as the command sees it, with model, lora and loss built."""
    from types import SimpleNamespace

    from hydra.utils import instantiate

    def make(name: str, overrides: list[str]) -> SimpleNamespace:
        config = _configuration(name, overrides)
        built = {key: instantiate(config[key]) for key in ("model", "lora", "loss", "optimizer")}
        return SimpleNamespace(**built, trainable=config.trainable)

    return make
