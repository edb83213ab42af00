"""The newest intact checkpoint of a run is found, and each one passed over is named with the reason."""

import os
import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from tests.checkpoints.conftest import content, write_folder

from vessel.checkpoints.reading import find_checkpoint, find_defect, find_newest_intact, read_checkpoint
from vessel.errors import VesselError


def save(path: Path, step: int, *, folder: bool = False) -> Path:
    """Save an intact checkpoint, `step` seconds after the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        write_folder(path, step)
    else:
        torch.save(content(step), path)
    os.utime(path / "latest" if folder else path, (step, step))
    return path


@pytest.fixture
def run(tmp_path):
    """Make a run with an intact checkpoint of step 10."""
    save(tmp_path / "checkpoints/best-000010.ckpt", 10)
    return tmp_path


def test_the_highest_step_is_taken_whatever_it_is_called(run):
    folder = run / "checkpoints"
    last = save(folder / "last-000020.ckpt", 20, folder=True)
    assert find_newest_intact(run) == (last, [])
    best = save(folder / "best-000030.ckpt", 30)
    os.utime(best, (1, 1))  # such as one that was copied back
    assert find_newest_intact(run) == (best, [])


def test_of_one_step_the_one_written_last_is_taken(run):
    folder = run / "checkpoints"
    for name, time in (("last-000010.ckpt", 12), ("last-000010-v1.ckpt", 11)):
        os.utime(save(folder / name, 10), (time, time))
    assert find_newest_intact(run) == (folder / "last-000010.ckpt", [])


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    """Change a number in a tensor, which only the checksum shows."""
    raw = bytearray(path.read_bytes())
    raw[raw.find(content(20)["state_dict"]["a"].numpy().tobytes())] ^= 1
    path.write_bytes(raw)


def of_something_else(path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 20}, path)


def without_step(path: Path) -> None:
    torch.save({"vessel": {}}, path)


def no_weights(path: Path) -> None:
    path.write_text("a note of the user")


DEFECTS = (
    (cut_short, "cut short"),
    (flip, r"damaged.*Bad CRC-32 for file .*/data/0"),
    (lambda path: path.write_bytes(b""), "empty"),
    (of_something_else, r"weights=\[\.\.\.\]"),
    (without_step, "step"),
    (no_weights, "not a zip file"),
    (lambda path: (path.unlink(), path.mkdir()), "without `latest`"),
    (lambda path: (path.unlink(), path.symlink_to(path.parent)), "without `latest`"),
)


@pytest.mark.parametrize(("spoil", "reason"), DEFECTS)
def test_guard_W10_a_damaged_file_is_passed_over_with_its_reason(run, spoil, reason):
    path = save(run / "checkpoints/last-000020.ckpt", 20)
    spoil(path)
    good, skipped = find_newest_intact(run)
    assert good == run / "checkpoints/best-000010.ckpt"
    assert len(skipped) == 1
    assert skipped[0].startswith("last-000020.ckpt: ")
    assert re.search(reason, skipped[0])
    assert skipped[0] == f"{path.name}: {find_defect(path)}"
    assert str(run) not in skipped[0]


def of_another_step(path: Path) -> None:
    other = write_folder(path.with_name("other"), 21)
    name = "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (other / name).replace(path / name)
    shutil.rmtree(other)


OF_FOLDERS = (
    (lambda path: (path / "latest").unlink(), "without `latest`"),
    (lambda path: (path / "latest").write_bytes(b"\xff"), "UnicodeDecodeError"),
    (lambda path: (path / "latest").write_text("elsewhere"), "elsewhere: .*zero_pp_rank_0"),
    (lambda path: (path / "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), "rank_1_mp_rank_00_optim"),
    (lambda path: (path / "checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt").unlink(), "rank_0_mp_rank_00_model"),
    (of_another_step, "different steps"),
    (lambda path: cut_short(path / "checkpoint/zero_pp_rank_1_mp_rank_00_model_states.pt"), "rank_1.*cut short"),
)


@pytest.mark.parametrize(("spoil", "reason"), OF_FOLDERS)
def test_guard_W10_a_damaged_folder_is_passed_over_with_its_reason(run, spoil, reason):
    path = save(run / "checkpoints/last-000020.ckpt", 20, folder=True)
    assert find_defect(path) is None
    spoil(path)
    assert find_newest_intact(run) == (run / "checkpoints/best-000010.ckpt", [f"{path.name}: {find_defect(path)}"])
    assert re.search(reason, str(find_defect(path)))


def test_guard_W10_a_changed_number_of_a_rank_is_found(run):
    path = save(run / "checkpoints/last-000020.ckpt", 20, folder=True)
    file = path / "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    raw = file.read_bytes()
    file.write_bytes(
        raw.replace((torch.arange(4.0) + 24).numpy().tobytes(), (torch.arange(4.0) + 25).numpy().tobytes())
    )
    assert file.read_bytes() != raw
    assert find_newest_intact(run)[1] == [f"last-000020.ckpt: {find_defect(path)}"]
    assert "rank_1" in str(find_defect(path))


@pytest.mark.parametrize("bit", [1, 2, 4, 8, 16, 32, 64, 128])
def test_guard_W10_every_changed_byte_is_found(tmp_path, bit):
    """Change each 37th byte of a file in turn: it is found, or the file still reads as it was written."""
    path = tmp_path / "last.ckpt"
    torch.save(content(1), path)
    raw = path.read_bytes()
    for at in range(bit % 37, len(raw), 37):
        changed = bytearray(raw)
        changed[at] ^= bit
        path.write_bytes(changed)
        if find_defect(path) is None:
            read, was = torch.load(path, weights_only=True), content(1)
            same = all(torch.equal(read["state_dict"].pop(name), t) for name, t in was.pop("state_dict").items())
            assert same, at
            assert read.pop("state_dict") == {}
            assert read == was


def test_an_entry_marked_as_a_folder_is_found(tmp_path):
    """Flip one bit, by which torch skips a tensor and returns uninitialised memory, while every checksum is right."""
    path = tmp_path / "last.ckpt"
    torch.save(content(1), path)
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"last/data/0", raw.find(b"PK\1\2")) - 8] ^= 0x10
    path.write_bytes(raw)
    assert "data/0 is marked" in str(find_defect(path))


def test_a_run_without_a_good_one(tmp_path):
    assert find_newest_intact(tmp_path) == (None, [])
    save(tmp_path / "checkpoints/last-000001.ckpt", 1).write_bytes(b"")
    assert find_newest_intact(tmp_path) == (None, ["last-000001.ckpt: empty"])


def test_leftovers_of_a_killed_save_are_no_checkpoints(run):
    folder = run / "checkpoints"
    save(folder / ".last-000020.ckpt.part", 20)
    save(folder / ".last-000030.ckpt.part", 30, folder=True)
    assert find_newest_intact(run) == (folder / "best-000010.ckpt", [])
    assert find_checkpoint(run, ("last", "best")) == folder / "best-000010.ckpt"
    for leftover in folder.glob(".*"):
        assert "cut short" in str(find_defect(leftover))
        with pytest.raises(VesselError, match=re.escape(leftover.name)):
            read_checkpoint(leftover)
    with pytest.raises(VesselError, match=r"last-000030\.ckpt\.part"):
        find_checkpoint(folder / ".last-000030.ckpt.part")


def test_a_backup_folder_gets_its_name_again(run):
    folder = run / "checkpoints"
    save(folder / ".last-000020.ckpt.aside", 20, folder=True)
    save(folder / ".best-000010.ckpt.aside", 9)  # another has its name
    assert find_newest_intact(run) == (folder / "last-000020.ckpt", [])
    assert read_checkpoint(folder / "best-000010.ckpt")["global_step"] == 10


def test_checksums_are_compared_without_the_file_in_memory(tmp_path):
    path = tmp_path / "last-000001.ckpt"
    torch.save(content(1) | {"optimizer_states": torch.zeros(5_000_000)}, path)
    tracemalloc.start()
    assert find_defect(path) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 < path.stat().st_size
