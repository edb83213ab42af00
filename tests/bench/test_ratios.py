"""The bench measures what its tables name, on networks of a few thousand weights."""

import json
from dataclasses import replace

import pytest
import torch
from bench.__main__ import describe, machine, rates
from bench.pairs import Pairs, in_turns
from bench.sizes import SMALL, Case, tiny
from tests.conftest import SIZES

from bench import answers, epochs, peak, report, startup, steps
from vessel.model.lora import Lora

ENCODERS = ("vision encoder", "SAM2 image encoder")
MINI = Case("mini", SIZES, Lora(r=2, dropout=0.0), "lora", images=2)


def test_a_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians():
    # 3, 1.5 and 2; the medians alone would give 4 / 2
    assert Pairs(product=[1.0, 4.0, 2.0], reference=[3.0, 6.0, 4.0]).ratio == 2.0
    assert Pairs(product=[1.0, 2.0, 10.0], reference=[9.0, 2.0, 10.0]).ratio == 1.0
    assert Pairs(unit="bytes", product=[3.0], reference=[4.0]).ratio == 0.75


def test_what_is_compared_runs_in_turns_after_a_run_that_does_not_count():
    order = []
    found = in_turns(lambda: order.append("own"), lambda: order.append("other"), pairs=2)
    assert order == ["own", "other"] * 3
    assert len(found.product) == len(found.reference) == 2


def test_both_modes_take_the_same_step(prompt):
    made = steps.Steps(MINI, prompt)
    before = {name: p.detach().clone() for name, p in made.network.named_parameters() if p.requires_grad}
    after = []
    for step in (made.product, made.reference):
        made.network.load_state_dict(before, strict=False)
        made.optimizer.state.clear()
        step()
        after.append({name: p.detach().clone() for name, p in made.network.named_parameters() if p.requires_grad})
    moved = [name for name in before if not torch.equal(before[name], after[0][name])]
    assert len(moved) > 0.8 * len(before)
    # AdamW's first step is of nearly the same length for every weight, whatever its gradient
    assert all((after[0][name] - after[1][name]).abs().max() < 1e-6 for name in before if "iou" not in name)


def test_the_parts_of_a_step_add_up_to_it(prompt):
    found, parts = steps.compare(MINI, prompt, pairs=3)
    assert parts["product"].keys() == parts["reference"].keys()
    assert {*ENCODERS, "language model", "mask decoder", steps.BACKWARD, steps.OPTIMIZER} <= set(parts["product"])
    assert all(seconds >= 0 for own in parts.values() for seconds in own.values())
    assert 0 < sum(parts["product"].values()) <= 2 * max(found.product)


def test_predictions_that_are_compared_are_the_same(prompt):
    compared = answers.Answers(MINI, prompt, phrases=3)
    one_pass = [torch.stack(one) for one in compared.product("forced")]
    for others in (compared.predict_forced(), compared.predict_generated(), compared.product("generate")):
        assert len(others) == answers.IMAGES
        for own, other in zip(one_pass, others, strict=True):
            assert own.shape == (3, 512, 512)
            assert torch.allclose(own, torch.stack(list(other)), atol=1e-5)


@pytest.mark.slow
def test_an_epoch_from_the_cache_runs_no_encoder(prompt, monkeypatch):
    spent = []
    once = steps.Steps.product

    def product(self, batch):
        once(self, batch)
        spent.append(any(name in self.spent["product"][-1] for name in ENCODERS))

    monkeypatch.setattr(steps.Steps, "product", product)
    found = epochs.compare(MINI, prompt, pairs=1, patients=3)
    half = len(spent) // 4
    assert half > 0
    assert spent == [False] * half + [True] * half + [False] * half + [True] * half
    assert found.images > half
    assert found.image_bytes > 1000


@pytest.mark.slow
def test_peak_memory_is_that_of_a_fresh_process():
    network, steps_of = 9.6e6, 4  # bytes of the tiny network; its gradients and optimizer take three times as many
    assert peak._in_fresh_process("product", "tiny") > steps_of * network


def test_the_table_names_every_ratio_with_what_was_wanted():
    parts = {mode: {"vision encoder": 0.25, steps.BACKWARD: 0.75} for mode in ("product", "reference")}
    seconds = {"unit": "s", "product": [1.0, 2.0, 3.0], "reference": [4.0, 5.0, 9.0]}
    found = {
        "ratios": dict.fromkeys(report.RATIOS, 2.5) | {"peak_memory": 0.5},
        "pairs": dict.fromkeys(report.RATIOS, seconds)
        | {"peak_memory": {"unit": "bytes", "product": [2e9], "reference": [4e9]}},
        "machine": machine(),
        "networks": {"small": describe(SMALL)},
        "cache": {"images": 8, "image_bytes": 2_000_000, "fill_seconds": 1.5},
        "parts": {"small": parts},
        "images_per_second": {"small": rates(parts, replace(SMALL, images=8))},
        "flop": {"step": 5e11, "per_second": 1e11, "share": 0.5},
        "scaling": {"training, against phrases": {"1": 0.1, "2": 0.15}},
        "startup": {startup.HELP: [0.8, 0.9], startup.STEP: [7.25, 7.5]},
    }
    text = report.table(json.loads(json.dumps(found)))
    assert "| training step | small | 2.00 s | 5.00 s | **2.5** | at least 2 times faster |" in text
    assert "| 2.00 GB | 4.00 GB | **0.50** | at most 0.6 of it |" in text
    assert "| **images a second** | 8.00 | 8.00 |" in text
    assert "500 GFLOP, 100 a second, 50%" in text
    assert "vocabulary 151,679" in text
    assert "| first training step of experiment=tiny | 7.2, 7.5 |" in text


def test_the_networks_of_the_bench_are_those_it_names():
    own = SMALL.sizes.language
    assert (own.width, own.layers, own.vocabulary) == (512, 8, 151_679)
    assert SMALL.sizes.vision.tokens_per_tile == 256
    assert (SMALL.lora.r, SMALL.lora.tokens) == (128, "full")  # as experiment=lora_r128
    assert tiny().sizes.language.width == 96  # as conf/model/tiny.yaml
