"""Differences that an export may have, and those that it may not."""

from dataclasses import replace

import numpy as np
import pytest

from vessel.errors import VesselError
from vessel.inference.loading import load_model
from vessel.inference.options import LoadSettings
from vessel.publishing.verification import (
    GreedyAnswer,
    NetworkResults,
    compare_results,
    network_results,
    results_of_fresh_process,
    synthetic_image,
)

RAMP = np.linspace(0, 1, 10_000, dtype=np.float32).reshape(1, 100, 100)
CERTAIN = GreedyAnswer("lumen", "Sure, [SEG].", (5, 6, 7), (9.0, 9.0, 9.0))


def results(answer=CERTAIN, **probabilities):
    return NetworkResults(probabilities, {name: [answer] for name in probabilities}, "f")


def test_other_masks_fail_the_verification():
    between = float(RAMP[0, 50, 0]) + 6e-5
    report = compare_results(results(a=RAMP), results(a=RAMP + 5e-5), threshold=between, dtype="fp32")
    assert "100.000% of mask pixels equal" in report
    assert "1 of 1 answers equal" in report
    with pytest.raises(VesselError, match=r"sample b: .* 0\.001"):
        compare_results(results(a=RAMP, b=RAMP), results(a=RAMP, b=RAMP + 1e-3), threshold=0.5, dtype="fp32")
    # 2 % of the pixels change sides, all of them within 0.05 of the threshold; then 10 % do.
    report = compare_results(results(a=RAMP), results(a=RAMP + 0.02), threshold=0.5, dtype="bf16")
    assert "98.000% of mask" in report
    with pytest.raises(VesselError, match="dtype=fp32"):
        compare_results(results(a=RAMP), results(a=RAMP + 0.1), threshold=0.5, dtype="bf16")


@pytest.mark.parametrize(("dtype", "margin"), [("fp32", 1e-3), ("bf16", 0.2)])
def test_other_answers_fail_the_verification_unless_the_network_was_undecided(dtype, margin):
    def compare_answers(margin_of_second, tokens):
        expected = results(replace(CERTAIN, margins=(9.0, margin_of_second, 0.0)), a=RAMP)
        found = results(replace(CERTAIN, tokens=tokens, text="No."), a=RAMP)
        return compare_results(expected, found, threshold=0.5, dtype=dtype)

    assert "0 of 1 answers equal (" in compare_answers(margin / 2, (5, 8))
    with pytest.raises(VesselError, match=r"sample a: .*lumen.*'No\.'.*'Sure, "):
        compare_answers(margin * 2, (5, 8))
    with pytest.raises(VesselError, match="sample a"):  # undecided later on, but not where they part
        compare_answers(margin / 2, (8, 8, 7))


@pytest.mark.slow
def test_a_fresh_process_gives_the_results_of_this_one(tiny_run):
    images = {"synthetic": synthetic_image(96), "other": synthetic_image(64)[:, :48]}
    here = network_results(load_model(str(tiny_run)), images)
    fresh = results_of_fresh_process(tiny_run, images, LoadSettings())
    assert here.fingerprint == fresh.fingerprint
    assert here.answers == fresh.answers
    assert all(np.array_equal(here.probabilities[name], fresh.probabilities[name]) for name in images)
    assert here.probabilities["other"].shape == (2, 64, 48)
    answer = here.answers["synthetic"][0]
    assert answer.phrase == "lumen"
    assert len(answer.tokens) == len(answer.margins) <= 64


@pytest.mark.slow
def test_a_margin_is_over_tokens_that_an_answer_may_hold(tiny_run):
    """The image token, which no answer holds, does not count."""
    model = load_model(str(tiny_run))
    images = {"synthetic": synthetic_image(64)}
    first = network_results(model, images).answers["synthetic"][0].tokens[0]
    rows = model.network.mllm.lm_head.weight.data
    rows[model.prompt.token_ids.image] = rows[first]
    answer = network_results(model, images).answers["synthetic"][0]
    assert answer.tokens[0] == first
    assert answer.margins[0] > 0
