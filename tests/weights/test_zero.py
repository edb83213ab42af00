"""ZeRO-3: folders of DeepSpeed are read exactly, and a network is built and loaded in parts; ranks are processes."""

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from tests.conftest import TINY_NETWORK
from tests.launching import ROOT, on_ranks
from tests.weights.layouts import (
    internvl_state,
    training_state,
    training_tree,
    write_folder,
    write_sa2va,
    write_sam2,
)

from vessel.checkpoints.reading import find_checkpoint
from vessel.errors import VesselError
from vessel.inference.loading import load_model
from vessel.weights.build import NetworkPlan
from vessel.weights.entry import Weights
from vessel.weights.recognition import open_source
from vessel.weights.zero import open_zero, open_zero_checkpoint

TINY = ("experiment=tiny", "prompt=small", "run=.", "data.root=none", *TINY_NETWORK)


# By hand -------------------------------------------------------------------------------------------------------------

SHAPES = {"network.a": (3,), "network.b": (2, 5), "network.c": ()}
WHOLE = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}


def parts(tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Flatten a tensor, pad it with zeros and partition it: [1, 2, 3] for two ranks is [1, 2] and [3, 0]."""
    size = -(-tensor.numel() // ranks)
    return list(torch.cat([tensor.flatten(), torch.zeros(size * ranks - tensor.numel())]).split(size))


MOMENTS = {"exp_avg": 2.0, "exp_avg_sq": 3.0}  # times the values


def write_zero2(folder: Path, *, ranks: int = 2) -> Path:
    """Write a folder of stage 2: `a` and `c` concatenated in one group, saved without the padding."""
    inner = folder / "checkpoint"
    inner.mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    model = {
        "module": {name: tensor.bfloat16() for name, tensor in WHOLE.items()} | {"network.buffer": torch.ones(2)},
        "buffer_names": ["network.buffer"], "shared_params": {}, "dp_world_size": ranks, "global_steps": 4,
        "param_shapes": [OrderedDict({name: WHOLE[name].shape for name in ("network.a", "network.c")})],
        "frozen_param_shapes": OrderedDict({"network.b": WHOLE["network.b"].shape}),
        "frozen_param_fragments": {"network.b": WHOLE["network.b"]}, "vessel": {"name": "by hand"},
    }  # fmt: skip
    torch.save(model, inner / "mp_rank_00_model_states.pt")
    end_to_end = torch.cat([WHOLE["network.a"], WHOLE["network.c"].flatten()])
    for rank, part in enumerate(parts(end_to_end, ranks)):
        state = {name: part * factor for name, factor in MOMENTS.items()} | {"step": torch.tensor(4.0)}
        unpadded = end_to_end[rank * len(part) : (rank + 1) * len(part)]
        optimizer = {
            "single_partition_of_fp32_groups": [unpadded],
            "base_optimizer_state": {"state": {0: state}, "param_groups": [{"lr": 0.1}]},
        }
        torch.save({"optimizer_state_dict": optimizer}, inner / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def write_zero(folder: Path, *, ranks: int = 2) -> Path:
    """Write a folder of stage 3: `b` frozen, `a` and `c` trained in a flat group of their own each."""
    inner = folder / "checkpoint"
    inner.mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    trained = [OrderedDict({name: WHOLE[name].shape}) for name in ("network.a", "network.c")]
    for rank in range(ranks):
        model = {
            "module": {"network.a": torch.empty(0), "network.buffer": torch.ones(2)},
            "buffer_names": ["network.buffer"], "param_shapes": trained, "shared_params": {},
            "frozen_param_shapes": OrderedDict({"network.b": WHOLE["network.b"].shape}),
            "frozen_param_fragments": {"network.b": parts(WHOLE["network.b"], ranks)[rank]},
            "dp_world_size": ranks, "global_steps": 4, "vessel": {"name": "by hand"},
        }  # fmt: skip
        flat = [parts(WHOLE[name], ranks)[rank] for name in ("network.a", "network.c")]
        state = {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1}, {"lr": 0.1}]}
        optimizer = {"fp32_flat_groups": flat, "optimizer_state_dict": state}
        torch.save(model, inner / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": optimizer}, inner / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_parts_of_all_ranks_make_the_whole(tmp_path, ranks):
    files = open_zero(write_zero(tmp_path / "last.ckpt", ranks=ranks))
    read = dict(files.read())
    assert all(torch.equal(read[name], WHOLE[name]) for name in WHOLE)
    assert {name: tensor.shape for name, tensor in files.outline.items()} == {n: t.shape for n, t in read.items()}
    assert all(tensor.is_meta for tensor in files.outline.values())
    assert torch.equal(read["network.buffer"], torch.ones(2))
    assert files.metadata["vessel"] == {"name": "by hand"}
    source = open_source(str(tmp_path / "last.ckpt"))
    assert source.kind.name == "checkpoint of a run"
    assert source.outline().keys() == {"a", "b", "c", "buffer"}


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_parts_of_stage_2_make_the_whole_with_its_moments(tmp_path, ranks):
    folder = write_zero2(tmp_path / "last.ckpt", ranks=ranks)
    read = dict(open_zero(folder).read())
    assert all(torch.equal(read[name], WHOLE[name]) for name in WHOLE)
    saved = open_zero_checkpoint(folder)
    assert (saved.steps, saved.groups[0]["lr"]) == (4, 0.1)
    for name in ("network.a", "network.c"):
        for moment, factor in MOMENTS.items():
            assert torch.equal(saved.trained[name].moments[moment].full(), WHOLE[name] * factor)
    assert torch.equal(saved.trained["network.a"].values.elements(1, 3), WHOLE["network.a"][1:])
    change(folder / "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt", lengthen)
    with pytest.raises(VesselError, match=r"last\.ckpt: .*5 numbers .* 4;"):
        open_zero(folder)


def lengthen(content) -> None:
    groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = torch.cat([groups[0], torch.ones(1)])


@pytest.mark.parametrize("kind", ["model", "optim"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_file_of_a_rank_is_named(tmp_path, kind, rank):
    lost = f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
    (write_zero(tmp_path / "z") / "checkpoint" / lost).unlink()
    with pytest.raises(VesselError, match=f"{lost} is missing"):
        open_zero(tmp_path / "z")


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_truncated_file_is_named(tmp_path, kind):
    file = write_zero(tmp_path / "z") / f"checkpoint/zero_pp_rank_1_mp_rank_00_{kind}_states.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(VesselError, match=f"{file.name}: "):
        open_zero(tmp_path / "z")


def change(file: Path, edit) -> None:
    content = torch.load(file)
    edit(content)
    torch.save(content, file)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("model", lambda s: s.update(global_steps=5), "different steps"),
        (
            "optim",
            lambda s: s["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["step"].add_(1),
            "different steps",
        ),
        ("optim", lambda s: s["optimizer_state_dict"]["fp32_flat_groups"].pop(), "DeepSpeed"),
        ("optim", lambda s: s.clear(), r"rank_1_mp_rank_00_optim_states\.pt: .*optimizer_state_dict"),
        ("optim", lambda s: s["optimizer_state_dict"]["fp32_flat_groups"].insert(0, torch.ones(9)), "numbers"),
        ("model", lambda s: s.update(frozen_param_fragments={}), "DeepSpeed"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, kind, edit, message):
    change(write_zero(tmp_path / "z") / f"checkpoint/zero_pp_rank_1_mp_rank_00_{kind}_states.pt", edit)
    with pytest.raises(VesselError, match=message):
        open_zero(tmp_path / "z")


def test_a_folder_without_latest_is_refused_by_every_reader(tmp_path):
    folder = write_zero(tmp_path / "best.ckpt")
    (folder / "latest").unlink()
    (folder / "zero_to_fp32.py").write_text("")
    for read in (open_zero, lambda path: open_source(str(path)), lambda path: load_model(str(path))):
        with pytest.raises(VesselError, match=r"best\.ckpt: latest "):
            read(folder)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_code_in_a_file_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change(
        write_zero(tmp_path / "z") / "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        lambda s: s.update(a=Evil()),
    )
    with pytest.raises(VesselError, match=r"\.system"):
        open_zero(tmp_path / "z")
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    write_zero(tmp_path / "z")
    for rank in range(2):
        change(tmp_path / f"z/checkpoint/zero_pp_rank_{rank}_mp_rank_00_model_states.pt", lambda s: s.pop("vessel"))
    for read in (open_source, load_model):
        with pytest.raises(VesselError, match=r"/z: .*vessel\.train"):
            read(str(tmp_path / "z"))


def test_the_newest_folder_or_file_is_found(tmp_path):
    """Order by the time of `latest`: that of a folder does not change when its files are rewritten."""
    folder = write_zero(tmp_path / "checkpoints/best-1.ckpt")
    (tmp_path / "checkpoints/best-2.ckpt").write_bytes(b"")
    os.utime(folder, (100, 100))
    os.utime(tmp_path / "checkpoints/best-2.ckpt", (200, 200))
    os.utime(folder / "latest", (300, 300))
    assert find_checkpoint(tmp_path) == folder
    assert find_checkpoint(folder) == folder
    os.utime(folder / "latest", (150, 150))
    assert find_checkpoint(tmp_path).name == "best-2.ckpt"


# By DeepSpeed --------------------------------------------------------------------------------------------------------


def launch(ranks: int, out: Path, *arguments: str) -> None:
    """Run `tests/training/zero_ranks.py` on some ranks."""
    status, printed = on_ranks(ranks, str(ROOT / "tests/training/zero_ranks.py"), str(out), *arguments, cwd=out)
    assert status == 0, printed[-4000:]


def plan_of(compose, *overrides: str, weights=()) -> NetworkPlan:
    """Make the plan of a configuration, without ranks."""
    config, prompt = compose("train", [*TINY, *overrides]), instantiate({"_target_": "vessel.data.prompt.Prompt"})
    return NetworkPlan(
        config.model, prompt.token_ids, prompt.new_tokens, lora=config.lora, trainable=config.trainable,
        weights=Weights.listed(list(weights)),
    )  # fmt: skip


@pytest.mark.slow
def test_each_rank_holds_its_part_of_a_network_that_is_the_same(compose, tmp_path):
    """Build every kind of base and adapters under `zero.Init`, and compare with the same plan without ranks."""
    torch.manual_seed(3)
    whole = plan_of(compose).build()
    base = write_sa2va(tmp_path / "base", whole, shards=3)
    first_new = plan_of(compose).new_tokens.start
    vlm = write_folder(tmp_path / "vlm", internvl_state(whole, first_new))
    sam2 = write_sam2(tmp_path / "sam2.pt", whole)
    tuned = tmp_path / "tuned.pth"
    torch.save({"state_dict": training_state(training_tree(whole, rank=8))}, tuned)
    lora = "lora.r=8 trainable=lora"
    variants = (
        ([], "trainable=all"),  # random
        ([base], "trainable=all trainer.precision=bf16-true"),
        ([base], lora),
        ([base], f"{lora} lora.tokens=new"),
        ([base, tuned], lora),
        ([vlm, sam2], "trainable=all"),  # rows of added tokens and the projection of [SEG] are random
    )
    fields = [f"{' '.join(TINY)} {choice} weights=[{','.join(map(str, weights))}]" for weights, choice in variants]
    launch(2, tmp_path, "build", *fields)
    for number, (weights, choice) in enumerate(variants):
        torch.manual_seed(0)
        expected = plan_of(compose, *choice.split(), weights=map(str, weights)).build()
        state = expected.state_dict()
        ranks = [torch.load(tmp_path / f"{number}.rank{rank}.pt") for rank in range(2)]
        dtype = torch.bfloat16 if "bf16" in choice else torch.float32
        total = sum(parameter.numel() * dtype.itemsize for parameter in expected.parameters())
        for rank in ranks:
            assert rank["later"], "zero.Init goes on after the network is built"
            assert rank["held"] == pytest.approx(total / 2, rel=0.01)
            assert rank["state"].keys() == state.keys()
            for name, tensor in rank["state"].items():
                assert torch.equal(tensor, state[name].to(tensor.dtype)), name
