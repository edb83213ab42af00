"""Checkpoints are complete or absent: after an error, a full disk, a rank that fails, and a kill at any moment."""

import os
import resource
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tests.checkpoints.conftest import content, killed, write_folder

from vessel.checkpoints.reading import find_defect, find_newest_intact, read_checkpoint
from vessel.checkpoints.writing import AtomicCheckpointIO, atomic_write
from vessel.errors import VesselError

MEGABYTE = 2**20


def put(path: Path, text: str, *, folder: bool) -> None:
    with atomic_write(path) as part:
        if folder:
            (part / "in").mkdir(parents=True)
        (part / "in/file" if folder else part).write_text(text)


@pytest.mark.parametrize("before", [None, False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_a_file_or_folder_takes_the_place_of_either(tmp_path, before, folder):
    path = tmp_path / "new/last.ckpt"
    if before is not None:
        put(path, "before", folder=before)
    put(path, "after", folder=folder)
    assert (path / "in/file" if folder else path).read_text() == "after"
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_what_a_link_points_at_stays(tmp_path):
    (tmp_path / "base.pt").write_text("base weights")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "base.pt")
    put(tmp_path / "last.ckpt", "after", folder=False)
    assert (tmp_path / "base.pt").read_text() == "base weights"
    assert not (tmp_path / "last.ckpt").is_symlink()


@pytest.mark.parametrize("error", [ValueError("no disk's"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_content_and_is_raised_as_it_is(tmp_path, error):
    path = tmp_path / "last.ckpt"
    put(path, "before", folder=False)

    def fail():
        with atomic_write(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_everything_is_flushed_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    put(tmp_path / "last.ckpt", "after", folder=True)
    part = tmp_path / ".last.ckpt.part"
    at = done.index("rename")
    assert set(done[:at]) == {part / "in/file", part / "in", part}
    assert len(done[:at]) == 3
    assert done[at + 1 :] == [tmp_path]


# Kills ---------------------------------------------------------------------------------------------------------------


def save_file(path: Path, step: int) -> None:
    AtomicCheckpointIO().save_checkpoint(content(step), path)


def save_folder(path: Path, step: int) -> None:
    with atomic_write(path) as part:
        write_folder(part, step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last-000002.ckpt", "last-000001.ckpt"], ids=["another name", "same name"])
@pytest.mark.parametrize("save", [save_file, save_folder])
def test_guard_W9_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path, save, name):
    steps, dies = [], True
    while dies:
        call = len(steps) + 1
        run = tmp_path / str(call)
        folder = run / "checkpoints"
        save(folder / "last-000001.ckpt", 1)
        dies = killed(lambda folder=folder: save(folder / name, 2), call)
        good, _ = find_newest_intact(run)
        assert good is not None
        assert find_defect(good) is None
        steps.append(read_checkpoint(good)["global_step"])
        assert {p.name for p in folder.glob("*.ckpt")} <= {"last-000001.ckpt", name}
        save(folder / "last-000003.ckpt", 3)
        assert find_newest_intact(run) == (folder / "last-000003.ckpt", [])
        assert not list(folder.glob(".*")), "the next save clears what the killed one left"
    assert len(steps) > 5
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


def test_guard_W9_the_next_save_keeps_a_backup_folder(tmp_path):
    """Start a run from elsewhere, which does not search for the newest checkpoint first."""
    save_folder(tmp_path / ".last-000001.ckpt.aside", 1)
    save_file(tmp_path / "last-000002.ckpt", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-000001.ckpt", "last-000002.ckpt"]


# Full disks ----------------------------------------------------------------------------------------------------------


def big(step: int, nbytes: int) -> dict:
    return content(step) | {"optimizer_states": [torch.zeros(nbytes // 8) for _ in range(2)]}


def test_guard_W9_a_full_disk_keeps_the_checkpoint_before(small_disk):
    """Save to a real file system, which the save fills up."""
    folder = small_disk / "run/checkpoints"
    AtomicCheckpointIO().save_checkpoint(content(1), folder / "last-000001.ckpt")
    with pytest.raises(VesselError, match=r"last-000002\.ckpt: .*quota") as raised:
        AtomicCheckpointIO().save_checkpoint(big(2, 8 * MEGABYTE), folder / "last-000002.ckpt")
    for named in ("4.2 MB", "last-000001.ckpt", "resume=auto"):
        assert named in str(raised.value)
    assert [path.name for path in folder.iterdir()] == ["last-000001.ckpt"]
    assert find_newest_intact(folder.parent) == (folder / "last-000001.ckpt", [])
    assert shutil.disk_usage(small_disk).used < MEGABYTE


def test_guard_W9_a_disk_that_fills_while_a_folder_is_written(small_disk):
    """Write as DeepSpeed does: torch opens the files, and drops the reason of the error."""
    save_folder(small_disk / "last-000001.ckpt", 1)

    def save():
        with atomic_write(small_disk / "last-000002.ckpt") as part:
            write_folder(part, 2)
            torch.save(big(2, 8 * MEGABYTE), part / "checkpoint/more.pt")

    with pytest.raises(VesselError, match=r"quota.*last-000001\.ckpt"):
        save()
    assert [path.name for path in small_disk.iterdir()] == ["last-000001.ckpt"]
    assert find_defect(small_disk / "last-000001.ckpt") is None
    assert shutil.disk_usage(small_disk).used < MEGABYTE


def test_guard_W9_a_disk_that_is_full_already(small_disk):
    """Write few bytes: torch buffers them to the end, so that the error comes when the file is closed."""
    save_folder(small_disk / "last-000001.ckpt", 1)

    def save():
        with atomic_write(small_disk / "last-000002.ckpt") as part:
            part.mkdir()
            (part / "latest").write_text("checkpoint")
            with suppress(OSError), (small_disk / "of the user").open("wb", buffering=0) as rest:
                while rest.write(bytes(4096)):
                    pass
            torch.save(content(2), part / "a.pt")

    with pytest.raises(VesselError, match=r"quota.*last-000001\.ckpt"):
        save()
    assert sorted(path.name for path in small_disk.iterdir()) == ["last-000001.ckpt", "of the user"]


@pytest.fixture
def small_files():
    """Limit files of this process to 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_guard_W9_a_limit_on_files_keeps_the_checkpoint_before(tmp_path, small_files):
    AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "last-000001.ckpt")
    with pytest.raises(VesselError, match=r"quota.*last-000001\.ckpt"):
        AtomicCheckpointIO().save_checkpoint(big(2, MEGABYTE), tmp_path / "last-000002.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last-000001.ckpt"]


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(VesselError, match=r"checkpoints/last\.ckpt: .*exists"):
        AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "checkpoints/last.ckpt")


# Several ranks -------------------------------------------------------------------------------------------------------


class Group:
    """Threads as ranks: `agree` waits for all of them, and no longer than a test may take."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=10)
        self.size = size

    def run(self, path: Path, write) -> list[BaseException | None]:
        """Run `write` on each rank; return what each raised."""
        raised: list[BaseException | None] = [None] * self.size
        votes = [True] * self.size

        def work(rank: int) -> None:
            def agree(vote: bool) -> bool:
                votes[rank] = vote
                self.barrier.wait()
                everyone = all(votes)
                self.barrier.wait()
                return everyone

            try:
                with atomic_write(path, is_main=rank == 0, agree=agree) as part:
                    write(rank, part)
            except Exception as error:
                raised[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised


def test_ranks_write_into_one_folder(tmp_path):
    path = tmp_path / "last.ckpt"
    for text in ("before", "after"):
        raised = Group(3).run(path, lambda rank, part, text=text: (part / str(rank)).write_text(text))
        assert raised == [None] * 3
    assert {file.name: file.read_text() for file in path.iterdir()} == dict.fromkeys("012", "after")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_guard_W9_a_rank_that_fails_stops_all_and_leaves_nothing(tmp_path, failing):
    path = tmp_path / "last.ckpt"
    Group(3).run(path, lambda rank, part: (part / str(rank)).write_text("before"))

    def write(rank: int, part: Path) -> None:
        (part / str(rank)).write_text("half")
        if rank == failing:
            raise OSError(28, "No space left on device")

    raised = Group(3).run(path, write)
    assert all(isinstance(error, VesselError) for error in raised)
    causes = ["another rank"] * 3
    causes[failing] = "quota"
    assert all(cause in str(error) for cause, error in zip(causes, raised, strict=True))
    assert {file.read_text() for file in path.iterdir()} == {"before"}
    assert list(tmp_path.iterdir()) == [path]


def test_ranks_do_not_wait_for_a_main_rank_that_cannot_begin(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    raised = Group(2).run(tmp_path / "checkpoints/last.ckpt", lambda rank, part: None)
    assert [type(error) for error in raised] == [VesselError] * 2
