import re

import pytest
import torch
from safetensors.torch import save_file

from vessel.batch import TokenIds
from vessel.errors import VesselError
from vessel.model.sa2va import build_sa2va
from vessel.model.weights import fingerprint, load_state, read_safetensors, to_native, to_public


def test_public_names_of_8b_are_the_published_list(shared, compose):
    keys = shared("reference/sa2va_internvl3_8b_keys.txt").read_text().split()
    with torch.device("meta"):
        network = build_sa2va(compose("train", ["model=internvl3_8b"]).model, TokenIds(151674, 151667, 151643, 151645))
        ours = dict(to_public(network.state_dict().items()))
    assert len(keys) == 1589
    assert sorted(ours) == sorted(keys)


def test_public_names_go_there_and_back(plan):
    state = plan().build().state_dict()
    back = dict(to_native(to_public(state.items())))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_name_of_no_part_is_an_error():
    with pytest.raises(VesselError, match=r"encoder\.weight belongs to no part"):
        list(to_native([("encoder.weight", torch.zeros(1))]))


def test_report_names_what_differs(plan):
    network = plan().build()
    state = dict(network.state_dict())
    del state["text_hidden_fcs.0.bias"]
    state["extra"] = torch.zeros(1)
    state["text_hidden_fcs.2.bias"] = torch.zeros(7)
    report = load_state(network, state.items(), "file")
    assert report.missing == ("text_hidden_fcs.0.bias",)
    assert report.unexpected == ("extra",)
    assert report.mismatched == ("text_hidden_fcs.2.bias: (7,) for (32,)",)
    with pytest.raises(VesselError, match=re.escape("1 missing (first: text_hidden_fcs.0.bias); 1 unexpected")):
        report.require_complete()


def test_weights_of_another_width_are_refused(plan, make_batch, tmp_path):
    network = plan().build()
    wide = {name: torch.zeros(*(2 * s for s in t.shape)) for name, t in to_public(network.state_dict().items())}
    save_file(wide, tmp_path / "model.safetensors")
    with pytest.raises(VesselError, match="of another shape"):
        plan(weights=[str(tmp_path)]).build()


def test_a_truncated_shard_is_refused(plan, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"text_hidden_fcs.0.bias": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(VesselError, match="damaged or truncated"):
        list(read_safetensors(tmp_path))


def test_an_absent_folder_is_refused_with_the_remedy(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VesselError, match="check the spelling"):
        plan(weights=["somebody/no-such-network"]).build()


def test_fingerprint_sees_names_values_and_dtypes_but_not_order():
    one, two = ("a", torch.ones(2)), ("b", torch.zeros(2))
    assert fingerprint([one, two]) == fingerprint([two, one])
    changed = [("c", torch.zeros(2)), ("b", torch.tensor([0, 1e-9])), ("b", torch.zeros(2).half())]
    assert len({fingerprint([one, other]) for other in [two, *changed]}) == 4
