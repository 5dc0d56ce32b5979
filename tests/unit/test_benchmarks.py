"""The harness around the benchmarks: overrides, pages, exponents, pictures. No benchmark is run."""

import json

import pytest

from benchmarks import plot, report, run, scaling
from benchmarks.comparisons import COMPARISONS
from benchmarks.work import WORKS, apply_settings, make_work
from stack.errors import ConfigError


def test_overrides_change_single_fields_of_a_work():
    work = make_work("small", ["seq_len=512", "shape.num_hidden_layers=4", "dtype=bf16", "tied=true"])
    assert (work.seq_len, work.dtype, work.llama["num_hidden_layers"]) == (512, "bf16", 4)
    assert work.llama["max_position_embeddings"] == 512
    assert work.llama["tie_word_embeddings"] is True
    assert work.llama["hidden_size"] == WORKS["small"].llama["hidden_size"]
    assert WORKS["small"].seq_len == 256


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("seqlen=512", "seq_len"),
        ("shape.layers=4", "num_hidden_layers"),
        ("seq_len=long", "must be int"),
        ("seq_len=0", "at least 1"),
        ("dtype=fp8", "fp32, bf16"),
        ("seq_len", "key=value"),
        ("seq_len=[", "YAML"),
    ],
)
def test_what_no_work_has_is_refused_in_one_line(setting, says):
    with pytest.raises(ConfigError) as refusal:
        make_work("small", [setting])
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_1b_work_has_as_many_parameters_as_its_model():
    assert WORKS["1b"].arithmetic.total_params == 1_235_814_400


def test_keys_of_a_config_are_set_at_any_depth_but_make_no_sections():
    tree = apply_settings(
        {"parallel": {"zero": 1, "offload": {"optimizer": "none"}}},
        ["parallel.zero=3", "parallel.offload.optimizer=cpu", "parallel.split=[0,3]"],
    )
    assert tree == {"parallel": {"zero": 3, "offload": {"optimizer": "cpu"}, "split": [0, 3]}}
    with pytest.raises(ConfigError, match="no such section"):
        apply_settings(tree, ["paralel.zero=3"])


def test_losses_that_differ_are_no_comparison(monkeypatch):
    found = {"tokens_per_s": 1.0, "loss": 5.0, "split": [0]}
    monkeypatch.setattr(run, "run", lambda command, device: {**found, "loss": float(command[0])})  # noqa: ARG005
    args = type("Args", (), {"device": "cpu"})
    with pytest.raises(run.BenchmarkError, match="not the same work"):
        run._turn({"peer": ["5.0"], "ours": ["5.1"]}, args, title="", tolerance=1e-4)
    run._turn({"peer": ["5.0"], "ours": ["5.0001"]}, args, title="", tolerance=1e-4)


def test_the_page_has_one_section_for_each_comparison(tmp_path):
    results = _results()
    page = report.write(results, tmp_path).read_text()
    assert page.count("\n## ") == 2
    assert page.count("- hardware:") == 2
    for result in results:
        assert f"| {result['entry']} " in page
        assert json.loads((tmp_path / "results" / f"{result['name'].replace(': ', '_')}.json").read_text()) == result


def test_the_exponent_of_a_power_law_is_found():
    xs = [1, 2, 4, 8]
    assert scaling.exponent(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert scaling.exponent(xs, [7.0] * 4) == pytest.approx(0)


def test_what_grows_faster_than_its_arithmetic_is_marked(monkeypatch):
    axis = scaling.AXES["microbatches"]
    found = iter(axis.points)

    def measured(point, _args):
        assert point == next(found)
        return {"tokens_per_s": 1.0, "step_s": point.x**1.3, "cpu_s_per_step": point.x, "grown_mib": 100, "runs": []}

    monkeypatch.setattr(scaling, "_measure", measured)
    result = scaling._measured(axis, None, {}, title="")
    assert result["exponents"]["flops"] == pytest.approx(1)
    assert result["faster_than_arithmetic"] == ["step_s"]


def test_stages_share_the_same_global_work():
    flops = {point.work.flops(point.replicas) for point in scaling.AXES["stages"].points}
    assert len(flops) == 1


def test_pictures_are_drawn(tmp_path):
    plot.draw(_results(), tmp_path / "ratios.png", title="Engine")
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


def test_the_picture_of_scaling_is_drawn(tmp_path):
    points = [{"x": x, "flops": x, "step_s": x, "cpu_s_per_step": x, "grown_mib": 10} for x in (1, 2)]
    exponents = {"flops": 1.0, "step_s": 1.0, "cpu_s_per_step": 1.0, "grown_mib": 0.0}
    axis = {"label": "layers", "points": points, "exponents": exponents}
    plot.draw_scaling([axis], tmp_path / "scaling.png", measures=scaling.MEASURES)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def _results():
    """Results of two comparisons, one of which has two entries."""
    made = []
    for comparison, entry in (("fsdp2", "zero3"), ("plain_zero3", "zero3"), ("plain_zero3", "zero3, least memory")):
        side = {"loss": 5.0, "load_before": 1.0, "cpu_s_per_step": 2.0, "peak_mib": [500, 510]}
        made.append(
            {
                "name": f"{comparison}: {entry}".replace(", ", "_").replace(" ", "_").replace(":_", ": "),
                "entry": entry,
                "ours": 1300.0,
                "peer": 1000.0,
                "ratio": 1.3,
                "spread": [1.2, 1.4],
                "goal": COMPARISONS[comparison].ours["zero3"].goal,
                "reached": True,
                "commands": {"ours": "python ours", "peer": "python peer"},
                "turns": [{"ours": side, "peer": side}],
                "comparison": comparison,
                "variant": "",
                "device": "cpu",
                "about": "About.",
                "work": "Llama",
                "steps": "3",
                "command": "python -m benchmarks.run",
                "versions": report.versions(),
                "hardware": report.hardware("cpu"),
                "date": f"{report.datetime.date.today().isoformat()}T00:00:00",
            }
        )
    return made
