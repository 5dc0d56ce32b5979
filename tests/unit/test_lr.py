import pytest

from stack.config.schema import Optim, Schedule
from stack.train.lr import learning_rate


def curve(steps: int = 100, **schedule) -> list[float]:
    options = Schedule(**{"warmup_steps": 10, "min_lr_ratio": 0.1, **schedule})
    return [learning_rate(step, steps, optim=Optim(lr=1.0), schedule=options) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_warms_up_to_the_peak_and_never_passes_it(kind):
    rates = curve(kind=kind)
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert max(rates) <= 1.0


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
def test_ends_at_the_smallest_rate_and_only_falls(kind):
    rates = curve(kind=kind)[10:]
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)


def test_cosine_is_half_way_down_in_the_middle():
    assert curve(steps=101, warmup_steps=0)[50] == pytest.approx(0.55)


def test_wsd_is_constant_until_its_decay():
    rates = curve(kind="wsd", decay_steps=20)
    assert rates[10:81] == pytest.approx([1.0] * 71)
    assert rates[90] < 1.0


def test_constant_stays():
    assert curve(kind="constant")[10:] == [1.0] * 90


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (15, 10), (11, 10), (2, 1)])
def test_a_short_run_ends_at_the_smallest_rate_too(kind, steps, warmup):
    assert curve(steps=steps, warmup_steps=warmup, kind=kind)[-1] == pytest.approx(0.1)
