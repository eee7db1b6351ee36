"""The progressive search: finds known optima, by the paper's order of stages, and goes on after any interruption."""

import itertools
import json
import statistics

import pytest

from sparseft.design_space import ALLOCATIONS, GROUPINGS, Options, Space, search

LETTERS = "BLS"
OPTIMUM = Space(("BL", "S", "LS"), "spindle", "decreasing", (1, 3))
OPTIONS = Options(groups=3, strategies=LETTERS, samples=6)


def separable(space, optimum=OPTIMUM):
    """Every dimension adds its own share, so that the best choice of each does not depend on the others."""
    groups = set(space.tunable) ^ set(optimum.tunable)
    letters = sum(
        len(set(space.strategies[i - 1]) ^ set(optimum.strategies[i - 1]))
        for i in space.tunable
        if i in optimum.tunable
    )
    return (
        20.0 * (space.grouping == optimum.grouping)
        + 20.0 * (space.allocation == optimum.allocation)
        - (20.0 * len(groups) + 0.1 * letters)
    )


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_known_optimum_is_found(grouping, allocation):
    optimum = Space(("BL", "S", "LS"), grouping, allocation, (1, 3))
    found = search(lambda space: separable(space, optimum), Options(groups=3, strategies=LETTERS, samples=40)).space
    assert (found.grouping, found.allocation, found.tunable) == (grouping, allocation, (1, 3))
    assert (found.strategies[0], found.strategies[2]) == ("BL", "LS")


def test_stages_come_in_the_order_of_the_paper_and_hold_what_was_chosen():
    seen = []

    def evaluate(space):
        seen.append(space)
        return separable(space)

    path = search(evaluate, OPTIONS)
    stages = [stage for stage, _ in itertools.groupby(path.choices, key=lambda choice: choice.stage)]
    assert stages == ["grouping", "allocation", "tunable", "strategies of group 1", "strategies of group 3"]
    values = {stage: [c.value for c in path.choices if c.stage == stage] for stage in stages}
    assert values["grouping"] == list(GROUPINGS)
    assert values["allocation"] == list(ALLOCATIONS)
    assert values["tunable"] == [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]
    assert values["strategies of group 1"] == ["B", "L", "S", "BL", "BS", "LS", "BLS"]
    fields = {
        "grouping": lambda space: space.grouping,
        "allocation": lambda space: space.allocation,
        "tunable": lambda space: space.tunable,
        "strategies of group 1": lambda space: space.strategies[0],
        "strategies of group 3": lambda space: space.strategies[2],
    }
    fixed, remaining = {}, iter(seen)
    for stage in stages:
        for choice in (c for c in path.choices if c.stage == stage):
            spaces = list(itertools.islice(remaining, len(choice.figures)))
            assert len(set(spaces)) == len(spaces) <= OPTIONS.samples
            assert [separable(space) for space in spaces] == list(choice.figures)
            for space in spaces:
                held = {**fixed, stage: choice.value}
                assert {key: fields[key](space) for key in held} == held
        kept = [c for c in path.choices if c.stage == stage and c.chosen]
        assert len(kept) == 1
        assert kept[0].mean == max(statistics.fmean(c.figures) for c in path.choices if c.stage == stage)
        fixed[stage] = kept[0].value
    assert not list(remaining)
    assert {key: field(path.space) for key, field in fields.items()} == fixed


def test_choices_are_judged_by_the_mean_and_not_by_the_best_space():
    def evaluate(space):
        lucky = space.grouping == "uniform" and space.allocation == "increasing"
        return 10.0 if lucky else 4.0 if space.grouping == "bottleneck" else -10.0

    path = search(evaluate, Options(groups=3, strategies="S", samples=30))
    assert path.space.grouping == "bottleneck"


def test_draws_reach_everything():
    drawn = []
    search(lambda space: drawn.append(space) or 0.0, Options(groups=2, strategies="BS", samples=200))
    first = [space for space in drawn if space.grouping == "increasing"]
    # 3 allocations, and strategies of the groups that train: 3 + 3 + 9
    assert len(set(first)) == 45
    assert {space.grouping for space in drawn} == {"increasing", "uniform", "decreasing"}


def test_a_search_goes_on_after_an_interruption_at_any_point(tmp_path):
    options = Options(groups=2, strategies="LS", groupings=("decreasing", "uniform"), samples=2)
    whole = tmp_path / "whole.jsonl"
    calls = []
    path = search(lambda space: calls.append(space) or separable(space), options, log=whole)
    assert len(whole.read_text().splitlines()) == len(calls) + 1
    for stop in range(len(calls) + 1):
        log, again = tmp_path / f"{stop}.jsonl", []

        def interrupted(space, stop=stop, again=again):
            if len(again) == stop:
                raise KeyboardInterrupt
            again.append(space)
            return separable(space)

        if stop < len(calls):
            with pytest.raises(KeyboardInterrupt):
                search(interrupted, options, log=log)
        resumed = search(lambda space, again=again: again.append(space) or separable(space), options, log=log)
        assert resumed == path
        assert again == calls
        assert log.read_text() == whole.read_text()


def test_a_line_that_a_crash_cut_short_is_evaluated_again(tmp_path):
    options = Options(groups=1, strategies="LS", groupings=("uniform",), samples=2)
    log = tmp_path / "log.jsonl"
    path = search(separable, options, log=log)
    whole = log.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {length for end in ends for length in (end - 1, end, end + 1, end + 40)} - {0}
    for length in [0, 1, *sorted(cut for cut in cuts if cut < len(whole))]:
        log.write_bytes(whole[:length])
        assert search(separable, options, log=log) == path
        assert log.read_bytes() == whole


def test_a_finished_search_evaluates_nothing(tmp_path):
    path = search(separable, OPTIONS, log=tmp_path / "log.jsonl")
    assert search(lambda space: pytest.fail("evaluated"), OPTIONS, log=tmp_path / "log.jsonl") == path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0].replace('"seed": 0', '"seed": 1'), *lines[1:]], "other seed"),
        (lambda lines: ["{}", *lines[1:]], "other format, groups"),
        (lambda lines: [lines[0], "not json", *lines[2:]], "cannot be gone on with"),
        (lambda lines: [lines[0], "[1]", *lines[2:]], "cannot be gone on with"),
        (lambda lines: ["7"], "cannot be gone on with"),
    ],
)
def test_logs_of_something_else_are_refused(change, message, tmp_path):
    log = tmp_path / "log.jsonl"
    search(separable, OPTIONS, log=log)
    log.write_text("\n".join(change(log.read_text().splitlines())) + "\n")
    before = log.read_bytes()
    with pytest.raises(ValueError, match=message):
        search(separable, OPTIONS, log=log)
    assert log.read_bytes() == before


@pytest.mark.parametrize("returned", [None, "good", [1.0, 2.0]])
def test_a_figure_is_a_number(returned):
    with pytest.raises(TypeError, match=r"evaluate must return a number, got"):
        search(lambda space: returned, OPTIONS)


def test_a_function_comes_first_and_options_after_it():
    with pytest.raises(TypeError, match="takes a function that judges a Space, then Options, got Options and"):
        search(OPTIONS, separable)


def test_impossible_spaces_are_not_drawn():
    def possible(space):
        return space.grouping != "uniform" and all("B" not in space.strategies[i - 1] for i in space.tunable)

    def evaluate(space):
        assert possible(space)
        return separable(space)

    path = search(evaluate, OPTIONS, possible=possible)
    assert not any("B" in path.space.strategies[i - 1] for i in path.space.tunable)
    assert {choice.label for choice in path.choices if not choice.figures} >= {"uniform", "B", "BL", "BS", "BLS"}
    assert "impossible" in str(path)
    with pytest.raises(ValueError, match="grouping: no choice is possible"):
        search(separable, OPTIONS, possible=lambda space: False)


SAME = [  # groups, layers, what is an earlier grouping by another name
    (4, (), {}),
    (4, (12,), {}),
    (4, (6,), {"decreasing": "uniform"}),  # 2, 2, 1, 1
    (4, (4,), dict.fromkeys(("uniform", "decreasing", "spindle", "bottleneck"), "increasing")),
    (4, (4, 6), {"decreasing": "uniform"}),
    (4, (4, 12), {}),
    (2, (), {"spindle": "uniform", "bottleneck": "uniform"}),
    (2, (6,), {"spindle": "uniform", "bottleneck": "uniform"}),
    (1, (), dict.fromkeys(("uniform", "decreasing", "spindle", "bottleneck"), "increasing")),
]


@pytest.mark.parametrize(("groups", "layers", "same"), SAME)
def test_patterns_that_coincide_are_judged_once(groups, layers, same):
    seen = []
    options = Options(groups=groups, layers=layers, strategies="S", samples=8)
    path = search(lambda space: seen.append(space) or (1.0 if space.grouping in same else 0.0), options)
    assert {c.value: c.same_as for c in path.choices if c.stage == "grouping" and c.same_as} == same
    assert {space.grouping for space in seen} == set(GROUPINGS) - set(same)
    assert all(bool(c.figures) != (c.value in same) for c in path.choices if c.stage == "grouping")
    assert {space.allocation for space in seen} == ({"increasing"} if groups == 1 else set(ALLOCATIONS))
    rows = {row.split()[0]: row.split() for row in str(path).splitlines()[2:6]}
    for name, first in same.items():
        assert rows[name] == [name, "0", "as", first]


def test_logs_are_of_the_layers_too(tmp_path):
    log, layers = tmp_path / "log.jsonl", (6, 6)
    path = search(separable, Options(groups=4, layers=layers, strategies="S", samples=2), log=log)
    again = search(pytest.fail, Options(groups=4, layers=layers, strategies="S", samples=2), log=log)
    assert again == path
    for other in ((), (6,), (12, 12)):
        with pytest.raises(ValueError, match="other layers"):
            search(separable, Options(groups=4, layers=other, strategies="S", samples=2), log=log)


def test_a_log_in_a_folder_that_is_not_there_is_refused_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; make it first"):
        search(pytest.fail, OPTIONS, log=tmp_path / "nowhere" / "log.jsonl")


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_figures_must_be_finite(figure, tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(ValueError, match="finite number, got"):
        search(lambda space: figure, OPTIONS, log=log)
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "fields",
    [{"groups": 0}, {"samples": 1.5}, {"strategies": "SX"}, {"strategies": ""}, {"groupings": ("uniform", "uniform")}]
    + [{"layers": layers} for layers in (6, (3,), (6, 2.0), (True,))],
)
def test_options_are_checked(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        Options(**fields)


def test_the_log_is_plain_json_and_the_table_and_the_picture_show_the_path(tmp_path):
    log = tmp_path / "log.jsonl"
    path = search(separable, OPTIONS, log=log)
    first, line = [json.loads(text) for text in log.read_text().splitlines()[:2]]
    assert first == {"format": "sparseft design space search 1", **OPTIONS.plain()}
    assert line.keys() == {"stage", "choice", "space", "figure"}
    assert Space.from_plain(line["space"]).grouping == line["choice"] == "increasing"
    text = str(path)
    assert len(text.splitlines()) == 1 + len(path.choices)
    assert text.count("kept") == 5
    spindle = next(row for row in text.splitlines() if "spindle" in row).split()
    choice = next(choice for choice in path.choices if choice.value == "spindle")
    error = statistics.stdev(choice.figures) / len(choice.figures) ** 0.5
    assert spindle == ["spindle", "6", f"{statistics.mean(choice.figures):.4f}", f"{error:.4f}", "kept"]
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'sparseft[plot]'")
    path.plot(tmp_path / "path.png")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; make it first"):
        path.plot(tmp_path / "nowhere" / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
