"""benchmarks/: the runner refuses different work, and computes what it says. No peer is needed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES
from tinyvllm import dummy
from tinyvllm.limits import MachineLimits
from tinyvllm.model_cost import ModelCost

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAKE = ("fake", "fake_peer")  # a name, and the module tests/fake_peer.py
FAMILY = "llama-3.2-tied"
LIMITS = MachineLimits(read_bandwidth_bytes_per_second=1e9, bf16_flops_per_second=1e11)


def _module(name: str) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


peer_process: Any = _module("peer_process")
command: Any = _module("command")
runner: Any = _module("runner")
results: Any = _module("results")
compare: Any = _module("compare")
peer: Any = _module("peers.peer")
our_peer: Any = _module("peers.tinyvllm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    FAMILIES[FAMILY].write(directory / "tiny")
    return directory


def row(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "name": "row",
        "what": "a row",
        "model": "tiny",
        "measures": "throughput",
        "num_prompts": 2,
        "prompt_len": 8,
        "max_tokens": 6,
    }
    return runner.Row(**settings | changes)


def run(models: Path, behaviour: str, **changes: Any) -> dict[str, Any]:
    """This engine, and one that does the same but for one thing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_PEER", behaviour)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        bench = runner.Bench(
            models=models,
            peers=[peer_process.PEERS["tinyvllm"], peer_process.PeerSpec(*FAKE)],
            rounds=2,
            limits=lambda: LIMITS,
        )
        result: dict[str, Any] = bench.run(row(**changes))
    return result


# --- The same work --------------------------------------------------------------------------------


def test_a_peer_that_does_the_same_work_is_compared(models: Path) -> None:
    result = run(models, "honest")
    ours, theirs = result["peers"]
    assert theirs["refused"] is None
    assert theirs["tokens"] == ours["tokens"] == {"prompt": 16, "output": 12}
    assert theirs["agreement"]["identical"] == 2
    assert theirs["ratio"] == pytest.approx(
        sum(a / b for a, b in zip(ours["values"], theirs["values"], strict=True)) / 2
    )


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("stops_early", "12 together; 2 came, of 5 to 5, 10 together"),
        ("drops_a_prompt", "12 together; 1 came, of 6 to 6, 6 together"),
        ("guesses", "nats less likely"),
    ],
)
def test_a_peer_that_does_less_work_is_refused(models: Path, behaviour: str, reason: str) -> None:
    result = run(models, behaviour)
    (_, theirs) = result["peers"]
    assert reason in theirs["refused"]
    assert "ratio" not in theirs
    assert "values" not in theirs
    assert "refused" in results.to_markdown([result])


def test_a_decode_begins_when_all_sequences_have_their_first_token(models: Path) -> None:
    """Tokens from before it would be counted in the time after it. This engine would give some,
    were its step shorter than all prompts."""
    result = run(models, "decodes_early", measures="decode")
    assert "3 tokens came while another sequence had none yet" in result["peers"][1]["refused"]
    assert row(measures="decode", num_prompts=8, prompt_len=512).step_tokens() == 4096
    assert row(measures="throughput", num_prompts=8, prompt_len=512).step_tokens() == 2048


def test_this_engine_says_how_many_tokens_came_early(models: Path) -> None:
    work = peer.Work([[7] * 16] * 4, [8] * 4)
    early = []
    for step_tokens in (64, 16):  # all prompts in one step, and one prompt at a time
        engine = our_peer.Tinyvllm(
            peer.Settings(
                models / "tiny",
                num_threads=1,
                max_num_seqs=4,
                max_model_len=64,
                max_step_tokens=step_tokens,
            )
        )
        early.append(engine.run(work).early_tokens)
    assert early[0] == 0
    assert early[1] >= 3 + 2 + 1  # the first sequence decodes while three others are read


def test_a_peer_that_breaks_down_is_not_compared_and_the_row_goes_on(models: Path) -> None:
    ours, theirs = run(models, "breaks_down")["peers"]
    assert len(ours["values"]) == 2
    assert theirs == {"peer": "fake", "missing": "failed (MemoryError: none left)"}


def test_a_row_that_fails_does_not_take_the_others_with_it(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--models", str(models), "--rounds", "1"])
    rows = [row(name="too-long", prompt_len=100_000), row(name="fits")]
    with pytest.raises(SystemExit) as stopped:
        command.main("A benchmark.", rows, [], tmp_path / "out.json")
    assert stopped.value.code == 1
    assert "error: too-long: tinyvllm" in capsys.readouterr().err
    assert [each["row"] for each in results.read_rows(tmp_path / "out.json")] == ["fits"]
    with pytest.raises(SystemExit):
        command.main("A benchmark.", rows[:1], [], tmp_path / "none.json")
    assert not list(tmp_path.glob("none.*"))


def test_a_peer_with_prompts_of_its_own_has_no_first_token_to_compare(models: Path) -> None:
    result = run(models, "own_prompts", measures="start", num_prompts=1, max_tokens=1)
    assert "its own prompts" in result["peers"][1]["missing"]


def test_a_peer_whose_first_token_is_another_one_has_not_started_the_same_work(
    models: Path,
) -> None:
    result = run(models, "guesses", measures="start", num_prompts=1, max_tokens=1)
    (_, theirs) = result["peers"]
    assert "nats less likely" in theirs["refused"]
    assert "values" not in theirs


def test_the_command_ends_with_an_error_where_a_peer_is_refused(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_PEER", "stops_early")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setitem(peer_process.PEERS, "fake", peer_process.PeerSpec(*FAKE))
    monkeypatch.setattr(sys, "argv", ["x.py", "--models", str(models), "--rounds", "1"])
    with pytest.raises(SystemExit) as stopped:
        command.main("A benchmark.", [row()], ["fake"], tmp_path / "out.json")
    assert stopped.value.code == 1
    assert "REFUSED" in capsys.readouterr().out
    assert "refused" in (tmp_path / "out.md").read_text()


def test_a_trial_leaves_the_results_alone(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "TRIALS", tmp_path / "trials")
    arguments = ["--models", str(models), "--rounds", "1", "--peers", "--scaled-by", "2"]
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    finished: list[Path] = []
    command.main("A.", [row()], [], tmp_path / "results" / "out.json", finish=finished.append)
    assert finished == [tmp_path / "trials" / "out.json"]
    assert finished[0].with_suffix(".md").exists()
    assert not (tmp_path / "results").exists()
    assert "all divided by 2" in capsys.readouterr().out


def test_all_engines_can_be_held_to_an_older_instruction_set(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TINYVLLM_CPU_ISA", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.setenv(variable, "")  # so that it is as before after the test
    arguments = ["--models", str(models), "--rounds", "1", "--peers", "--isa", "portable"]
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    with pytest.raises(SystemExit):  # its rows must not take the place of the others
        command.main("A benchmark.", [row()], [], tmp_path / "out.json")
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments, "--output", str(tmp_path / "out.json")])
    command.main("A benchmark.", [row()], [], tmp_path / "results.json")
    (result,) = results.read_rows(tmp_path / "out.json")
    assert result["machine"]["isa"] == "portable"
    assert result["command"] == "benchmarks/x.py --rounds 1 --isa portable"
    assert "device cpu (portable)" in (tmp_path / "out.md").read_text()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "SSE41"


@pytest.mark.parametrize(
    ("most", "here", "best"),
    [
        ("amx", ["amx", "avx512", "avx512bf16", "avx2", "portable"], "amx"),
        ("avx512bf16", ["amx", "avx512", "avx512bf16", "avx2", "portable"], "avx512"),
        ("avx512bf16", ["avx512bf16", "avx512", "avx2", "portable"], "avx512bf16"),
        ("avx2", ["avx512bf16", "avx512", "avx2", "portable"], "avx2"),
    ],
)
def test_of_older_sets_this_engine_takes_what_it_would_take_there(
    monkeypatch: pytest.MonkeyPatch, most: str, here: list[str], best: str
) -> None:
    monkeypatch.setattr(command, "supported_isas", lambda: here)
    assert command._best_isa(most) == best


def test_nobody_comes_always_behind_the_same_one() -> None:
    orders = {"".join(runner._in_turns(list("abc"), number)) for number in range(6)}
    assert orders == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_a_row_may_have_this_engine_in_several_configurations(models: Path) -> None:
    variants = {"static": {"batching": "static"}, "small": {"num_gpu_blocks_override": 0}}
    result = run(models, "honest", variants=variants)
    ours, static, small, theirs = result["peers"]
    assert [static["peer"], small["peer"]] == ["tinyvllm static", "tinyvllm small"]
    assert "options" not in ours
    assert static["options"] == {"batching": "static"}
    assert static["agreement"]["identical"] == 2
    assert static["ratio"] > 0
    assert "num_gpu_blocks_override" in small["missing"]  # which shows that it arrives
    static["ratio"] = theirs["ratio"] / 2
    assert results.best_ratio(result) == theirs["ratio"]  # the others', not our own


def test_a_peer_that_is_not_installed_has_a_line_that_says_so_and_no_column(models: Path) -> None:
    result = run(models, "missing")
    (_, theirs) = result["peers"]
    assert "not installed" in theirs["missing"]
    head, *_, last = results.to_markdown([result, result]).splitlines()
    assert head == "| work | tinyvllm | limit | share | best ratio |"
    assert last == f"- {theirs['peer']} did not run: {theirs['missing']}"


def test_a_difference_at_a_near_tie_is_no_other_work() -> None:
    work = peer_process.Work([[1, 2], [3, 4]], [3, 3])
    ours = peer_process.Outcome([[5, 6, 7], [8, 9, 10]], 1.0, 0.5)
    theirs = peer_process.Outcome([[5, 6, 7], [8, 11, 12]], 1.0, 0.5)
    asked = []

    def near_misses(prompts: list[list[int]], tokens: list[int]) -> list[float]:
        asked.append((prompts, tokens))
        return [peer_process.NEAR_TIE / 2]

    agreement = peer_process.check_agreement(work, ours, theirs, near_misses)
    assert asked == [([[3, 4, 8]], [11])]  # the prompt and what both gave, then the other's token
    assert agreement == {
        "sequences": 2,
        "identical": 1,
        "shortest_common_prefix": 1,
        "largest_gap": peer_process.NEAR_TIE / 2,
    }
    with pytest.raises(peer_process.DifferentWorkError, match="token 1 of sequence 1 is 11"):
        peer_process.check_agreement(work, ours, theirs, lambda *_: [peer_process.NEAR_TIE * 2])


# --- Figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measures", "changes", "value"),
    [
        ("decode", {"num_prompts": 1}, 5 / 1.5),
        ("prefill", {}, 16 / 0.5),
        ("throughput", {}, 12 / 2.0),
    ],
)
def test_what_a_row_measures(measures: str, changes: dict[str, Any], value: float) -> None:
    outcome = peer_process.Outcome([], seconds=2.0, first_token_seconds=0.5)
    one = row(measures=measures, **changes)
    assert one.value(one.work(384), outcome) == pytest.approx(value)


@pytest.mark.parametrize("measures", ["load", "start", "start_text", "memory"])
def test_rows_of_whole_processes(models: Path, measures: str) -> None:
    result = run(models, "honest", measures=measures, num_prompts=1, max_tokens=1)
    for peer in result["peers"]:
        assert peer["agreement"] is None or peer["agreement"]["identical"] == 1
        assert len(peer["values"]) == 2
        assert all(value > 0 for value in peer["values"])
    low, high = (1 << 20, 1 << 32) if measures == "memory" else (0.001, 60)
    assert low < result["peers"][0]["median"] < high


def test_limits_of_a_known_model(tmp_path: Path) -> None:
    """Llama-3.2-1B by hand: a step reads 2.47 GB, a token costs 1.95 GFLOP in the layers."""
    config = dummy.NAMED_CONFIGS["llama-3.2-1b"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    cost = ModelCost(tmp_path)
    limits = MachineLimits(29.5e9, 450e9)
    assert cost.step_bytes == pytest.approx(2.4715e9, rel=1e-3)
    decode = 63 / cost.decode_seconds(limits, [16], [63])
    assert decode == pytest.approx(11.9, rel=0.01)
    prefill = 512 / cost.prefill_seconds(limits, [512])
    assert prefill == pytest.approx(226, rel=0.03)  # the 226 leaves out the attention
    batch = row(num_prompts=32, prompt_len=32, max_tokens=64)
    batched = batch.limit(batch.work(128_256), cost, limits)
    assert batched == pytest.approx(130, rel=0.03)


def test_a_results_file_says_nothing_of_who_and_where(models: Path, tmp_path: Path) -> None:
    result = run(models, "honest")
    results.put_row(tmp_path / "out.json", result, ["row"])
    text = (tmp_path / "out.json").read_text() + results.to_markdown([result])
    assert str(models) not in text
    assert str(Path.home()) not in text
    import platform

    assert platform.node() not in text
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == [result]


def test_a_new_run_of_a_row_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    for name, value in (("b", 1), ("a", 2), ("b", 3)):
        results.put_row(path, {"row": name, "value": value}, ["a", "b"])
    assert results.read_rows(path) == [{"row": "a", "value": 2}, {"row": "b", "value": 3}]


def test_every_benchmark_is_a_list_of_rows_with_names_of_their_own() -> None:
    for name in ("cpu", "compare", "gpu"):
        rows = _module(name).ROWS
        names = [one.name for one in rows]
        assert len(names) == len(set(names))
        assert all(dataclasses.is_dataclass(one) for one in rows)


def test_prompts_are_the_same_in_every_run_and_without_special_tokens() -> None:
    first, second = (row(prompt_len=64).work(384) for _ in range(2))
    assert first == second
    assert all(token > 100 for prompt in first.prompts for token in prompt)


# --- The comparison in the README -----------------------------------------------------------------


def test_the_readme_shows_what_compare_has_measured() -> None:
    """Before the first run, nothing; after it the plot, and the table of its JSON."""
    rows = results.read_rows(results.DIRECTORY / "compare.json")
    readme = compare.README.read_text(encoding="utf-8")
    assert compare.pasted(readme, rows) == readme
    for suffix in (".md", ".png", ".svg"):
        assert (results.DIRECTORY / f"compare{suffix}").exists() == bool(rows)
    if rows:
        table = (results.DIRECTORY / "compare.md").read_text()
        assert table == results.to_markdown(rows)
        assert table in readme


def test_figures_take_the_place_of_the_old_ones(models: Path) -> None:
    result = run(models, "honest")
    readme = f"before\n{compare._BEGIN}old\n{compare._END}after\n"
    new = compare.pasted(readme, [result])
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert results.to_markdown([result]) in new
    assert "compare.svg" in new
    assert "old" not in new
    assert compare.pasted(new, [result]) == new
    with pytest.raises(ValueError, match=r"README\.md has no"):
        compare.pasted("before\n", [result])


def test_the_table_and_the_plot_say_what_was_checked_and_where(models: Path) -> None:
    result = run(models, "honest")
    assert "12 tokens from each engine; sequences with the very same: fake 2 of 2\n" in (
        results.to_markdown([result])
    )
    result["peers"][1]["agreement"].update(identical=1, largest_gap=0.25)
    assert "fake 1 of 2; the others part at a near tie, of 0.25 nats at the most" in (
        results.to_markdown([result])
    )
    caption = results.measured_where([result])
    assert "medians of 2 rounds" in caption
    assert "it read 1 to 1 GB/s and multiplied 100 to 100 GFLOP/s" in caption
