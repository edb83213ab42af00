"""Files of tensors are read without running code, and damaged ones are refused."""

import json
import os
import pickle
import re
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.weights.layouts import write_folder

from vessel.errors import VesselError
from vessel.weights.files import INDEX, SINGLE, load_pickle, open_pickle, open_safetensors

STATE = {f"part.{i}": torch.full((4, i + 1), float(i)) for i in range(5)}


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_are_read_as_one(tmp_path, shards):
    files = open_safetensors(write_folder(tmp_path, STATE, shards=shards))
    assert files.outline["part.3"].shape == (4, 4)
    assert files.outline["part.3"].is_meta
    assert files.nbytes == 4 * 4 * 15
    read = dict(files.read())
    assert read.keys() == STATE.keys() == files.outline.keys()
    assert all(torch.equal(read[name], STATE[name]) for name in STATE)


def test_a_truncated_shard_is_refused(tmp_path):
    write_folder(tmp_path, STATE, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(VesselError, match=r"model-00002-of-00002\.safetensors: .*truncated"):
        open_safetensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_folder(tmp_path, STATE, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(VesselError, match=r"model-00002-of-00003\.safetensors .*1 of 3"):
        open_safetensors(tmp_path)


def test_shards_without_their_index_are_refused(tmp_path):
    write_folder(tmp_path, STATE, shards=3)
    (tmp_path / INDEX).unlink()
    with pytest.raises(VesselError, match=rf"model-00001-of-00003\.safetensors .*{re.escape(INDEX)}"):
        open_safetensors(tmp_path)


def test_an_index_that_names_other_tensors_is_refused(tmp_path):
    write_folder(tmp_path, STATE, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["part.9"] = index["weight_map"].pop("part.1")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(VesselError, match=r"2 tensors .*first: part\.1"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("shard", [None, 3, ["model-00001-of-00002.safetensors"]])
def test_an_index_that_names_no_file_is_refused(tmp_path, shard):
    write_folder(tmp_path, STATE, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["part.1"] = shard
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(VesselError, match="weight_map"):
        open_safetensors(tmp_path)


def test_two_sets_of_weights_in_a_folder_are_refused(tmp_path):
    """Refuse them: an index of older shards would silently win over a newer single file."""
    write_folder(tmp_path, STATE, shards=2)
    write_folder(tmp_path, {name: tensor + 1 for name, tensor in STATE.items()})
    with pytest.raises(VesselError, match=rf"{re.escape(SINGLE)}.*{re.escape(INDEX)}, .* 2 "):
        open_safetensors(tmp_path)
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    with pytest.raises(VesselError, match=rf"{re.escape(SINGLE)}.*{re.escape(INDEX)}, "):
        open_safetensors(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "model.safetensors")}))
    assert dict(open_safetensors(tmp_path).read())["part.0"].eq(1).all()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(VesselError, match=rf"{re.escape(SINGLE)} nor {re.escape(INDEX)}"):
        open_safetensors(tmp_path)


def test_numbers_of_an_unknown_type_are_refused(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(VesselError, match="type C64"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_tensors_are_found_at_the_root_or_below(tmp_path, wrap, zipped):
    torch.save(wrap(STATE), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    files = open_pickle(tmp_path / "w.pth")
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in files.read())
    assert files.outline.keys() == STATE.keys()
    assert set(files.metadata) <= {"epoch"}


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "meta": Evil()}, "evil.pth")
    with pytest.raises(VesselError, match=r"evil\.pth: .*\.system"):
        open_pickle(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle at all", pickle.dumps({"a": 1})])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(VesselError, match=r"w\.pth"):
        open_pickle(tmp_path / "w.pth")


@pytest.fixture
def history(monkeypatch):
    """Define mmengine's history of a logged value, as a pickle stores it: arrays, and its own methods by name."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._count_history = np.array([1.0, 2.0]), np.array([1, 1])
            self._max_length = 1000000
            self._statistics_methods = OrderedDict(mean=HistoryBuffer.mean)

        def mean(self):
            return self._log_history.mean()

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = HistoryBuffer.__module__, "HistoryBuffer.mean"
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
    return HistoryBuffer


def test_objects_of_mmengine_with_the_tensors_are_ignored(tmp_path, history):
    hub = {"log_scalars": OrderedDict({"train/loss": history()}), "runtime_info": OrderedDict(iter=np.float64(3))}
    torch.save({"meta": {"iter": 3672, "cfg": "text"}, "state_dict": STATE, "message_hub": hub}, tmp_path / "i.pth")
    files = open_pickle(tmp_path / "i.pth")
    assert files.metadata["meta"]["iter"] == 3672
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in files.read())


def test_the_exception_holds_for_mmengine_alone(tmp_path, history):
    torch.save({"state_dict": STATE, "cfg": types.SimpleNamespace(a=1)}, tmp_path / "i.pth")
    with pytest.raises(VesselError, match=r"SimpleNamespace"):
        load_pickle(tmp_path / "i.pth")
