import json
import math

import numpy as np
import pytest
from bench.coverage import METHODS, SHAPES, main
from scipy import stats

from vessel.metrics.intervals import cluster_interval

SEVEN = np.array([0.91, 0.88, 0.62, 0.85, 0.9, 0.79, 0.3])


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    drawn = np.random.default_rng(0).choice(values, (1000, len(values)))
    return tuple(np.quantile(drawn.mean(1), [0.025, 0.975]))


def test_it_equals_a_loop_over_the_draws():
    ordered, rng, n = np.sort(SEVEN), np.random.default_rng(5), 7
    s, mean = np.std(ordered, ddof=1), np.mean(ordered)
    noise, picks = rng.standard_normal((400, n)), rng.integers(n, size=(400, n))
    t = []
    for pick, extra in zip(picks, noise, strict=True):
        draw = [ordered[i] + e * s / math.sqrt(n) for i, e in zip(pick, extra, strict=True)]
        t.append((np.mean(draw) - mean) / (np.std(draw, ddof=1) / math.sqrt(n)))
    least, greatest = np.quantile(t, [0.05, 0.95])
    expected = mean - greatest * s / math.sqrt(n), mean - least * s / math.sqrt(n)
    assert cluster_interval(SEVEN, level=0.9, draws=400, seed=5) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_of_many_clusters_it_is_that_of_scipy(method):
    values = np.random.default_rng(3).uniform(0.5, 1, 200)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method=method, rng=1).confidence_interval
    ours = cluster_interval(values, draws=9999)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03 * (theirs.high - theirs.low))


@pytest.mark.parametrize("n", [2, 3])
def test_of_two_or_three_clusters_it_is_nearly_that_of_student(n):
    values = SEVEN[:n]
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    ours = cluster_interval(values, draws=20_000)
    assert high - low < ours[1] - ours[0] < 1.6 * (high - low)


def test_the_long_end_lies_where_the_far_patient_is():
    low, high = cluster_interval(SEVEN)
    assert SEVEN.mean() - low > 1.5 * (high - SEVEN.mean())


def test_it_depends_on_the_seed_and_not_on_the_order():
    assert cluster_interval(SEVEN, seed=1) == cluster_interval(SEVEN[::-1], seed=1) != cluster_interval(SEVEN, seed=2)


def test_a_wider_level_is_a_wider_interval():
    narrow, wide = cluster_interval(SEVEN, level=0.8), cluster_interval(SEVEN, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bounded_scores_stay_in_their_range():
    values = [1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.2]
    assert cluster_interval(values)[1] > 1
    low, high = cluster_interval(values, bounds=(0, 1))
    assert 0 <= low < np.mean(values) < high == 1
    assert cluster_interval([0.0, 1.0], bounds=(0, 1)) == (0, 1)


def test_equal_clusters_have_no_width_and_one_cluster_has_no_interval():
    assert cluster_interval([0.1] * 7) == (0.1, 0.1)
    assert cluster_interval([0.3, 0.1 + 0.2]) == (pytest.approx(0.3), pytest.approx(0.3))
    assert cluster_interval([0.1]) == cluster_interval([]) == (None, None)


def test_ties_leave_the_ends_finite():
    low, high = cluster_interval([0, 0, 0, 0, 0, 0, 9.0])
    assert math.isfinite(low)
    assert math.isfinite(high)


@pytest.mark.parametrize(("values", "level"), [([0.1, math.nan], 0.95), ([0.1, math.inf], 0.95), ([0.1, 0.2], 95)])
def test_values_and_levels_that_mean_nothing_are_refused(values, level):
    with pytest.raises(ValueError, match="finite"):
        cluster_interval(values, level=level)


@pytest.mark.parametrize(
    ("population", "true_mean", "least"), [("standard_normal", 0.0, 0.93), ("standard_exponential", 1.0, 0.92)]
)
def test_guard_I9_of_seven_patients_it_covers_where_percentiles_do_not(population, true_mean, least):
    rng = np.random.default_rng(11)
    sets = [getattr(rng, population)(7) for _ in range(600)]

    def coverage(ends) -> float:
        return float(np.mean([low <= true_mean <= high for low, high in ends]))

    assert least < coverage([cluster_interval(values, draws=1000) for values in sets]) < 0.98
    assert coverage([percentile_interval(values) for values in sets]) < least - 0.05


@pytest.mark.slow
def test_the_bench_measures_every_method_on_every_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main("7", "40")
    found = json.loads((tmp_path / "outputs/bench/coverage.json").read_text())
    assert found["shapes"].keys() == SHAPES.keys()
    for name, methods in found["shapes"].items():
        assert methods.keys() == METHODS.keys()
        assert all(0.4 < method["coverage"] <= 1 and method["width"] > 0 for method in methods.values()), name
        assert methods["percentile"]["outside"] == 0
    assert "studentised, smoothed (vessel)" in capsys.readouterr().out


@pytest.mark.parametrize("name", SHAPES)
def test_the_simulated_patients_have_the_stated_mean(name):
    shape, rng = SHAPES[name], np.random.default_rng(2)
    patients = shape.patients(rng, 1500)
    assert abs(patients.mean() - shape.true_mean(rng, 200_000)) < 4 * stats.sem(patients)
    assert ((patients >= shape.bounds[0]) & (patients <= shape.bounds[1])).all()
