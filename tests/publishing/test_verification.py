"""Differences that an export may have, and those that it may not."""

from dataclasses import replace

import numpy as np
import pytest

from vessel.errors import VesselError
from vessel.inference.loading import load_model
from vessel.inference.options import LoadSettings
from vessel.publishing.verification import Account, Said, account_in_a_fresh_process, account_of, compare, drawn_image

RAMP = np.linspace(0, 1, 10_000, dtype=np.float32).reshape(1, 100, 100)
SURE = Said("lumen", "Sure, [SEG].", (5, 6, 7), (9.0, 9.0, 9.0))


def told(said=SURE, **maps):
    return Account(maps, {name: [said] for name in maps}, "f")


def test_other_masks_fail_the_proof():
    between = float(RAMP[0, 50, 0]) + 6e-5
    one = compare(told(a=RAMP), told(a=RAMP + 5e-5), threshold=between, dtype="fp32")
    assert "100.000% of mask pixels equal" in one
    assert "1 of 1 answers equal" in one
    with pytest.raises(VesselError, match=r"sample b: .* up to 0\.001"):
        compare(told(a=RAMP, b=RAMP), told(a=RAMP, b=RAMP + 1e-3), threshold=0.5, dtype="fp32")
    # 2 % of the pixels change sides, all of them within 0.05 of the threshold; then 10 % do.
    assert "98.000% of mask" in compare(told(a=RAMP), told(a=RAMP + 0.02), threshold=0.5, dtype="bf16")
    with pytest.raises(VesselError, match="dtype=fp32"):
        compare(told(a=RAMP), told(a=RAMP + 0.1), threshold=0.5, dtype="bf16")


@pytest.mark.parametrize(("dtype", "lead"), [("fp32", 1e-3), ("bf16", 0.2)])
def test_other_words_fail_the_proof_unless_the_network_was_undecided(dtype, lead):
    def words(lead_there, tokens):
        expected = told(replace(SURE, leads=(9.0, lead_there, 0.0)), a=RAMP)
        return compare(expected, told(replace(SURE, tokens=tokens, text="No."), a=RAMP), threshold=0.5, dtype=dtype)

    assert "0 of 1 answers equal (the rest part" in words(lead / 2, (5, 8))
    with pytest.raises(VesselError, match=r"sample a: asked for lumen, the export answers 'No\.' where .* 'Sure, "):
        words(lead * 2, (5, 8))
    with pytest.raises(VesselError, match="sample a"):  # undecided later on, but not where they part
        words(lead / 2, (8, 8, 7))


@pytest.mark.slow
def test_a_fresh_process_says_what_this_one_says(tiny_run):
    images = {"drawn": drawn_image(96), "other": drawn_image(64)[:, :48]}
    here = account_of(load_model(str(tiny_run)), images)
    there = account_in_a_fresh_process(tiny_run, images, LoadSettings())
    assert here.fingerprint == there.fingerprint
    assert here.said == there.said
    assert all(np.array_equal(here.maps[name], there.maps[name]) for name in images)
    assert here.maps["other"].shape == (2, 64, 48)
    answer = here.said["drawn"][0]
    assert answer.phrase == "lumen"
    assert len(answer.tokens) == len(answer.leads) <= 64


@pytest.mark.slow
def test_a_lead_is_over_what_could_have_been_said(tiny_run):
    """The image token, which no answer holds, does not count."""
    restored = load_model(str(tiny_run))
    first = account_of(restored, {"drawn": drawn_image(64)}).said["drawn"][0].tokens[0]
    rows = restored.network.mllm.lm_head.weight.data
    rows[restored.prompt.token_ids.image] = rows[first]
    answer = account_of(restored, {"drawn": drawn_image(64)}).said["drawn"][0]
    assert answer.tokens[0] == first
    assert answer.leads[0] > 0
