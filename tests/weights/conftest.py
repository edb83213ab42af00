"""Networks built from sources, for tests of loading."""

import pytest
import torch
from tests.weights.layouts import internvl_state, write_folder, write_sam2

from vessel.weights.entry import Weights


@pytest.fixture
def network(plan):
    """Build a network whose weights the sources hold."""
    return plan().build().eval()


@pytest.fixture
def load(plan):
    """Return a function: `load("folder", {"source": ..., "partial": [...]}, lora=...)` builds network and reports."""

    def build(*sources, **changes):
        made = plan(weights=Weights.listed([s if isinstance(s, dict) else str(s) for s in sources]), **changes)
        return made.build().eval(), made.reports

    return build


@pytest.fixture
def internvl(network, prompt, tmp_path):
    """Write an InternVL folder of the language and vision part of `network`, without the added tokens."""
    return write_folder(tmp_path / "internvl", internvl_state(network, prompt.new_tokens.start))


@pytest.fixture
def sam2(network, tmp_path):
    """Write a SAM 2.0 file of the grounding part of `network`."""
    return write_sam2(tmp_path / "sam2.pt", network)


def same(one, two, part=""):
    """Return True if all tensors whose name holds `part` are equal; at least one must exist."""
    state, other = one.state_dict(), two.state_dict()
    names = [name for name in other if part in name]
    return bool(names) and all(torch.equal(state[name], other[name]) for name in names)
