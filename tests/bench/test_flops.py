"""Operations of a step: those of its parts add up to it, and those of the language model follow from its sizes."""

from dataclasses import replace

import pytest
from bench.flops import Cost, recipe, step_cost, table, whole_cost
from bench.pieces import DECODER, HEAD, LANGUAGE, PROJECTOR, SAM2, VISION
from tests.conftest import SIZES

from vessel.data.prompt import Prompt
from vessel.losses import NativeLoss
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.plan import Images, Setup, batch_of
from vessel.model.lora import Lora

SETUP = Setup(SIZES, Lora(r=8), "lora", NativeLoss(), Engine(), batch_size=2, images=Images((64, 64), 2))


@pytest.fixture(scope="module")
def parts():
    return step_cost(SETUP)


def test_the_parts_add_up_to_the_step(parts):
    assert summed(parts) == whole_cost(SETUP)


@pytest.mark.slow
def test_the_parts_add_up_where_everything_trains(parts):
    everything = replace(SETUP, lora=Lora(r=0), trainable="all")
    found = step_cost(everything)
    assert summed(found) == whole_cost(everything)
    assert found[SAM2].forward == parts[SAM2].forward < found[SAM2].backward


def summed(parts):
    return Cost(sum(cost.forward for cost in parts.values()), sum(cost.backward for cost in parts.values()))


def by_formula(setup):
    """Count forward and backward pass of the language model with adapters, on inputs that require a gradient.

    A weight takes two operations a token forward and two for the gradient of its input; one that trains two more.
    """
    sizes = setup.sizes.language
    batch, length = batch_of(setup, Prompt()).input_ids.shape
    tokens, head = batch * length, sizes.width // sizes.heads
    kv = sizes.kv_heads * head
    shapes = [(sizes.width, sizes.width), (sizes.width, kv), (sizes.width, kv), (sizes.width, sizes.width)]
    shapes += [(sizes.width, sizes.mlp)] * 2 + [(sizes.mlp, sizes.width)]
    weights = sizes.layers * sum(a * b for a, b in shapes)
    adapters = sizes.layers * sum(setup.lora.r * (a + b) for a, b in shapes)
    scores = sizes.layers * 2 * 2 * batch * sizes.heads * length**2 * head  # queries by keys, and by values
    return Cost(2 * tokens * (weights + adapters) + scores, 2 * tokens * (weights + 2 * adapters) + 2 * scores)


def test_the_language_model_costs_what_follows_from_its_sizes(parts):
    # Some versions of transformers make the angles of positions by a product of matrices, which the formula leaves out.
    assert parts[LANGUAGE] == pytest.approx(by_formula(SETUP), rel=1e-3)


@pytest.mark.slow
def test_a_language_model_of_true_width_costs_what_follows_from_its_sizes():
    published = recipe("internvl3_8b")
    language = replace(published.sizes.language, layers=2)
    setup = replace(published, sizes=replace(SIZES, language=language))
    assert step_cost(setup)[LANGUAGE] == pytest.approx(by_formula(setup), rel=1e-3)


def test_what_is_frozen_has_no_backward_pass_and_what_trains_pays_for_its_weights(parts):
    assert parts[VISION].backward == parts[SAM2].backward == 0
    # its first layer stands behind a norm that trains too, and so hands a gradient on
    assert parts[PROJECTOR].backward == 2 * parts[PROJECTOR].forward > 0
    assert parts[HEAD].backward == 2 * parts[HEAD].forward
    assert parts[DECODER].backward > parts[DECODER].forward


def test_the_head_is_paid_for_supervised_tokens_only(parts):
    supervised = int((batch_of(SETUP, Prompt()).labels[:, 1:] != -100).sum())
    assert parts[HEAD].forward == 2 * supervised * SIZES.language.width * SIZES.language.vocabulary


def test_the_table_has_every_part_and_the_sum():
    lines = table({"one": {"a": Cost(10**12, 2 * 10**12), "b": Cost(10**12, 0)}})
    assert lines[2:] == ["| a | 1.00 + 2.00 |", "| b | 1.00 + 0.00 |", "| **together** | 4.00 |"]
