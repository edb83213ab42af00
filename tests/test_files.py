"""Files and folders that are whole or absent."""

import json
import os
import stat

import pytest

from vessel import files
from vessel.errors import VesselError
from vessel.files import put_in_place, readable, require_space, size_on_disk, write_file, write_folder, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "a.json"
    write_file(file, "old")
    write_json(file, {"name": "gefäß"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"name": "gefäß"}
    assert file.read_text(encoding="utf-8").endswith("}\n")
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    file = tmp_path / "a.txt"
    write_file(file, "old")

    def refuse(*_):
        raise OSError(28, "ENOSPC")

    monkeypatch.setattr(files.os, step, refuse)
    with pytest.raises(OSError, match="ENOSPC"):
        write_file(file, "new")
    assert file.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_private_file_is_for_its_owner_only(tmp_path):
    write_file(tmp_path / "salt", b"1", private=True)
    write_file(tmp_path / "open", b"1")
    mask = os.umask(0)
    os.umask(mask)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("salt", "open")]
    assert modes == [0o600, 0o666 & ~mask]


def test_a_folder_has_its_name_once_it_is_whole(tmp_path):
    out = tmp_path / "new/deep/out"
    with write_folder(out) as part:
        assert not out.exists()
        assert part.parent == out.parent
        (part / "a").write_text("1", encoding="utf-8")
    assert names(out) == ["a"]
    assert names(out.parent) == ["out"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail():
        with write_folder(tmp_path / "new/deep/out") as part:
            (part / "a").write_text("1", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


def test_a_folder_is_replaced_only_with_overwrite(tmp_path):
    out = tmp_path / "out"
    with write_folder(out) as part:
        (part / "old").write_text("1", encoding="utf-8")
    with pytest.raises(VesselError, match="out"), write_folder(out):
        raise AssertionError("never entered")
    with pytest.raises(KeyboardInterrupt), write_folder(out, overwrite=True):
        raise KeyboardInterrupt
    assert names(out) == ["old"]
    with write_folder(out, overwrite=True) as part:
        (part / "new").write_text("1", encoding="utf-8")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_may_be_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with write_folder(out) as part:
        (part / "a").write_text("1", encoding="utf-8")
    assert names(out) == ["a"]


def test_what_was_there_comes_back_when_the_rename_fails(tmp_path, monkeypatch):
    out, part, aside = tmp_path / "out", tmp_path / "part", tmp_path / "aside"
    for folder in (out, part):
        folder.mkdir()
        (folder / folder.name).touch()
    replace = os.replace

    def refuse(source, target):
        if source == part:
            raise OSError(5, "EIO")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="EIO"):
        put_in_place(part, out, aside)
    assert names(out) == ["out"]
    assert names(tmp_path) == ["out", "part"]


def test_a_full_disk_is_refused_with_the_remedy(tmp_path):
    require_space(tmp_path / "new/deep", 1, "files", "")
    with pytest.raises(VesselError, match=r"new/deep: files .*1000000\.00 GB .*other=DISK$"):
        require_space(tmp_path / "new/deep", 10**15, "files", "other=DISK")


def test_sizes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a").write_bytes(bytes(300))
    (tmp_path / "b").write_bytes(bytes(7))
    assert (size_on_disk(tmp_path), size_on_disk(tmp_path / "b"), size_on_disk(tmp_path / "none")) == (307, 7, 0)
    assert (readable(5_120_000_000), readable(8_400_000)) == ("5.12 GB", "8.4 MB")
    assert readable(2_000, below=".3g") == "0.002 MB"
