"""The trace file: valid, complete, and enough to rebuild where every block was (docs/trace.md)."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint_files import LLAMA
from tinyvllm import LLM, _core, dummy
from tinyvllm.errors import CapacityError, InvalidRequestError

VOCAB = 64  # of LLAMA
Event = dict[str, Any]
Sequence = tuple[int, int]  # request, sample


class Replay:
    """Rebuilds the block tables, the queues and the cached blocks from the events of a trace."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.tables: dict[Sequence, list[int]] = {}
        self.cached: set[int] = set()  # blocks whose content can be found, also those in use

    def apply(self, event: Event) -> None:
        args = event.get("args", {})
        sequence = (args.get("request"), args.get("sample"))
        name = event["name"]
        if name == "engine":
            self.num_blocks = args["num_blocks"]
        elif name == "queued" and event["ph"] == "B":
            if sequence in self.running:  # preempted: it is the first to come back
                self.running.remove(sequence)
                self.waiting.insert(0, sequence)
            else:
                self.waiting.append(sequence)
        elif name == "admitted":
            assert self.waiting.pop(0) == sequence
            self.running.append(sequence)
            self.tables[sequence] = []
        elif name == "forked":
            older = self.running.index((args["request"], args["sample"] - 1))
            self.running.insert(older + 1, sequence)
        elif name == "share":  # all blocks of the sequence that it was forked from
            assert self.tables[args["request"], args["from_sample"]] == args["blocks"]
            self.tables[sequence] = list(args["blocks"])
        elif name in ("hit", "allocate"):
            assert len(self.tables[sequence]) == args["position"]
            self.tables[sequence] += args["blocks"]
        elif name == "copy":
            assert self.tables[sequence][args["position"]] == args["from"]
            self.tables[sequence][args["position"]] = args["to"]
        elif name == "release":
            assert self.tables.pop(sequence) == args["blocks"]
        elif name == "publish":
            assert self.tables[sequence][args["position"]] == args["block"]
            self.cached.add(args["block"])
        elif name in ("evict", "forget"):
            self.cached.remove(args["block"])
        elif name == "finished":
            (self.running if sequence in self.running else self.waiting).remove(sequence)

    def counts(self) -> list[int]:
        held = Counter(block for table in self.tables.values() for block in table)
        return [held[block] for block in range(self.num_blocks)]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trace-model")
    path: Path = dummy.write_checkpoint(directory, LLAMA, seed=3, dtype="float32", tokenizer=False)
    return path


def engine_of(path: Path, **options: Any) -> Any:
    return _core.Engine(path, **{"max_num_seqs": 4, "num_threads": 1, "num_blocks": 40, **options})


def params(**options: Any) -> Any:
    return _core.SamplingParams(**{"temperature": 1.0, "ignore_eos": True, **options})


def prompt_of(rng: random.Random, common: list[int], length: int) -> list[int]:
    """Some beginning of what prompts have in common, then tokens of its own."""
    shared = rng.choice([0, 8, 12, len(common)])
    return common[:shared] + [rng.randrange(VOCAB) for _ in range(length)]


def follow(path: Path) -> Iterator[list[Event]]:
    """Each next() gives the events that the file has got since the last one."""
    with path.open() as file:
        assert file.readline() == "[\n"
        while True:
            lines = (line.strip(",\n") for line in file.read().splitlines())
            yield [json.loads(line) for line in lines if line]


def args_of(events: list[Event], name: str) -> list[dict[str, Any]]:
    """The arguments of all events of that name; ends of slices have none."""
    return [event["args"] for event in events if event["name"] == name and event["ph"] != "E"]


def run_to_the_end(engine: Any) -> list[tuple[int, int, int, str | None]]:
    tokens = []
    while engine.has_unfinished():
        output = engine.step()
        tokens += zip(output.request, output.sample, output.token, output.finish, strict=True)
    return tokens


# --- The replay -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 64},
        {"num_blocks": 13, "max_num_seqs": 6, "max_num_batched_tokens": 16},
        {"num_blocks": 13, "max_num_seqs": 6, "max_num_batched_tokens": 7},
        {"num_blocks": 13, "max_num_seqs": 6, "prefix_hash_mask": 0, "max_num_batched_tokens": 40},
        {"num_blocks": 13, "max_num_seqs": 6, "prefix_caching": False},
        {"num_blocks": 20, "max_num_seqs": 6, "static_batching": True},
        {"num_blocks": 20, "max_num_seqs": 6, "fail_at_step": 12},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_replay_is_where_the_engine_is_after_every_step(
    model: Path, tmp_path: Path, options: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    common = [rng.randrange(VOCAB) for _ in range(18)]
    path = tmp_path / "trace.json"
    engine = engine_of(model, block_size=4, max_model_len=50, trace=path, **options)
    replay, news, seen = Replay(), follow(path), []
    num_added = 0
    while num_added < 24 or engine.has_unfinished():
        for _ in range(rng.randrange(4) if num_added < 24 else 0):
            prompt = prompt_of(rng, common, rng.randrange(1, 14))
            options_of_it = {"n": rng.choice([1, 1, 1, 3]), "max_tokens": rng.randrange(1, 16)}
            engine.add_request(num_added, prompt, params(**options_of_it))
            num_added += 1
        if rng.random() < 0.15:
            engine.abort(rng.randrange(num_added + 1))
        if rng.random() < 0.15:
            engine.finish(rng.randrange(num_added + 1), rng.randrange(3), "stop")
        engine.step()

        for event in next(news):
            replay.apply(event)
            seen.append(event)
        snapshot, stats = engine.snapshot(), engine.stats()
        sequences = [((s["request"], s["sample"]), s["running"]) for s in snapshot["sequences"]]
        assert [(sequence, True) for sequence in replay.running] + [
            (sequence, False) for sequence in replay.waiting
        ] == sequences
        tables = {(s["request"], s["sample"]): s["block_table"] for s in snapshot["sequences"]}
        assert {key: replay.tables.get(key, []) for key in tables} == tables
        assert replay.tables.keys() <= tables.keys()
        assert replay.counts() == snapshot["block_counts"]
        assert sorted(replay.cached) == snapshot["cached_blocks"]
        if args_of(seen, "step"):
            assert args_of(seen, "step")[-1]["step"] == stats["num_steps"]

    stats = engine.stats()
    assert len(args_of(seen, "step")) == stats["num_steps"]
    assert len(args_of(seen, "preempted")) == stats["num_preemptions"]
    hits = sum(len(args["blocks"]) for args in args_of(seen, "hit"))
    assert 4 * hits == stats["prefix_cache_hits"]
    prefill = sum(args["tokens"] for args in args_of(seen, "prefill"))
    assert prefill == sum(args["prefill_tokens"] for args in args_of(seen, "step"))


def test_the_random_runs_have_all_that_can_happen(model: Path, tmp_path: Path) -> None:
    """Else the test above would pass on a trace that leaves out what never happens in it."""
    rng = random.Random(1)
    path = tmp_path / "trace.json"
    engine = engine_of(
        model, block_size=4, num_blocks=13, max_model_len=50, max_num_seqs=6, trace=path
    )
    common = [rng.randrange(VOCAB) for _ in range(18)]
    for id in range(16):
        prompt = prompt_of(rng, common, rng.randrange(1, 14))
        engine.add_request(id, prompt, params(n=rng.choice([1, 3]), max_tokens=12))
    run_to_the_end(engine)
    engine.reset_prefix_cache()
    engine.close()
    names = {event["name"] for event in json.loads(path.read_text())}
    assert names >= {"queued", "admitted", "prefill", "decode", "forked", "preempted", "finished"}
    assert names >= {"allocate", "share", "hit", "copy", "publish", "evict", "forget", "release"}


def test_a_step_that_fails_takes_its_published_blocks_back(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    engine = engine_of(model, block_size=4, trace=path, fail_at_step=1)
    engine.add_request(1, list(range(10)), params())
    run_to_the_end(engine)
    engine.close()
    events = json.loads(path.read_text())
    replay = Replay()
    for event in events:
        replay.apply(event)
    assert [args["failed"] for args in args_of(events, "step")] == [1]
    assert [args["reason"] for args in args_of(events, "finished")] == ["error"]
    assert len(args_of(events, "publish")) == len(args_of(events, "forget")) == 2
    assert (replay.cached, replay.tables, replay.running, replay.waiting) == (set(), {}, [], [])


# --- What a reader sees -----------------------------------------------------------------------


@pytest.fixture
def events(model: Path, tmp_path: Path) -> list[Event]:
    """Two requests that do not fit together: the second one is preempted and comes back."""
    path = tmp_path / "trace.json"
    with_trace = {"trace": path, "block_size": 4, "num_blocks": 8, "max_model_len": 32}
    engine = engine_of(model, max_num_batched_tokens=10, **with_trace)
    engine.add_request(7, list(range(13)), params(max_tokens=12))
    engine.add_request(9, list(range(20, 26)), params(max_tokens=12, n=2))
    run_to_the_end(engine)
    engine.close()
    events: list[Event] = json.loads(path.read_text())
    return events


def test_every_track_has_a_name(events: list[Event]) -> None:
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    assert list(names.values()) == [
        "steps",
        "block pool",
        "request 7",
        "request 9 sample 0",
        "request 9 sample 1",
    ]
    groups = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert groups == ["engine", "requests"]
    assert {(event["pid"], event["tid"]) for event in events if event["tid"]} == set(names)
    assert {pid for pid, _ in names}.isdisjoint(tid for _, tid in names)


def test_the_first_request_is_seen_from_the_queue_to_its_end(events: list[Event]) -> None:
    tid = next(event["tid"] for event in events if event.get("args", {}).get("name") == "request 7")
    shown = [
        (event["ph"], event["name"])
        for event in sorted(events, key=lambda event: float(event["ts"]))
        if (event["pid"], event["tid"]) == (2, tid) and event["ph"] != "M"
    ]
    assert shown == [
        ("B", "queued"),
        ("E", "queued"),
        ("i", "admitted"),
        ("X", "prefill"),
        ("X", "prefill"),
        ("B", "decode"),
        ("E", "decode"),
        ("i", "finished"),
    ]
    chunks = [args for args in args_of(events, "prefill") if args["request"] == 7]
    assert [(args["first"], args["tokens"]) for args in chunks] == [(0, 10), (10, 3)]
    (finished,) = (args for args in args_of(events, "finished") if args["request"] == 7)
    assert (finished["reason"], finished["output_tokens"]) == ("length", 12)


def test_a_preemption_says_why(model: Path, tmp_path: Path) -> None:
    """Request 0 needs a third block for its token 8, when 0 and 1 hold all four."""
    path = tmp_path / "trace.json"
    engine = engine_of(model, trace=path, block_size=4, num_blocks=4)
    engine.add_request(0, list(range(7)), params(max_tokens=4))
    engine.add_request(1, list(range(20, 25)), params(max_tokens=4))
    run_to_the_end(engine)
    engine.close()
    assert args_of(json.loads(path.read_text()), "preempted") == [
        {
            "request": 1,
            "sample": 0,
            "reason": "too few free blocks: the last to come gives way",
            "for_request": 0,
            "for_sample": 0,
            "free_blocks": 0,
            "lost_tokens": 6,
        }
    ]


def test_a_sequence_that_preempts_itself_says_so(events: list[Event]) -> None:
    first = args_of(events, "preempted")[0]
    assert (first["request"], first["sample"]) == (first["for_request"], first["for_sample"])
    assert first["reason"] == "too few free blocks, and it came last itself"


def test_a_step_says_what_it_computed_and_what_it_might_have(events: list[Event]) -> None:
    first, second = args_of(events, "step")[:2]
    assert (first["tokens"], first["budget"], first["sequences"]) == (10, 10, 1)
    assert (second["prefill_tokens"], second["decode_tokens"], second["sequences"]) == (9, 0, 2)


def test_the_counters_add_up_to_the_pool(events: list[Event]) -> None:
    counters = args_of(events, "blocks")
    assert len(counters) == len(args_of(events, "step"))
    assert {sum(args.values()) for args in counters} == {8}
    assert counters[-1]["used"] == 0


def test_slices_nest_and_time_does_not_go_back(events: list[Event]) -> None:
    """On every track a slice begins after the end of the last one, or lies within it."""
    open_until: dict[tuple[int, int], list[float]] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e.get("dur", 0))):
        if event["ph"] == "X":
            ends = open_until.setdefault((event["pid"], event["tid"]), [])
            end = event["ts"] + event["dur"]
            while ends and ends[-1] <= event["ts"] + 1e-6:
                ends.pop()
            assert not ends or end <= ends[-1] + 1e-6, event
            ends.append(end)
    begun = Counter((e["name"], e["tid"]) for e in events if e["ph"] == "B")
    assert begun == Counter((e["name"], e["tid"]) for e in events if e["ph"] == "E")


# --- The file ---------------------------------------------------------------------------------


def test_tokens_are_the_same_with_and_without_it(model: Path, tmp_path: Path) -> None:
    def tokens(**options: Any) -> list[tuple[int, int, int, str | None]]:
        rng = random.Random(5)
        engine = engine_of(model, block_size=4, num_blocks=13, max_model_len=40, **options)
        for id in range(8):
            engine.add_request(id, prompt_of(rng, [1] * 18, 5), params(max_tokens=9, n=2))
        return run_to_the_end(engine)

    assert tokens() == tokens(trace=tmp_path / "trace.json")


def test_without_it_no_file_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = engine_of(model)
    engine.add_request(0, [1, 2, 3], params())
    run_to_the_end(engine)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "missing/trace.json"])
def test_a_path_that_cannot_be_written_is_refused_by_name(
    model: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    with pytest.raises(InvalidRequestError) as caught:
        engine_of(model, trace=path)
    reason = "No such file or directory" if name else "Is a directory"
    assert f"The trace file {path} cannot be written: {reason}" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"kv_cache_memory_bytes": 1}, CapacityError), ({"dtype": "int4"}, InvalidRequestError)],
)
def test_an_engine_that_is_not_made_leaves_the_last_trace(
    model: Path, tmp_path: Path, wrong: dict[str, Any], error: type[Exception]
) -> None:
    path = tmp_path / "trace.json"
    engine_of(model, trace=path).close()
    before = path.read_bytes()
    with pytest.raises(error):
        engine_of(model, **{"trace": path, "num_blocks": None, **wrong})
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is Linux'")
def test_a_full_disk_ends_the_trace_and_not_the_run(model: Path) -> None:
    engine = engine_of(model, trace="/dev/full")
    engine.add_request(0, [1, 2, 3], params(max_tokens=5))
    assert len(run_to_the_end(engine)) == 5
    (warning,) = engine.info()["warnings"]
    assert warning.startswith("the trace /dev/full ends early, the run does not: No space left")


def test_a_trace_that_ends_early_has_whole_events(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    script = """
        import resource, sys
        from tinyvllm import _core
        engine = _core.Engine(sys.argv[1], trace=sys.argv[2], num_blocks=40, num_threads=1)
        engine.add_request(0, [1, 2, 3], _core.SamplingParams(max_tokens=50, ignore_eos=True))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        while engine.has_unfinished():
            engine.step()
        (warning,) = engine.info()["warnings"]
        print(warning)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(model), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"the trace {path} ends early, the run does not: File too large." in result.stdout
    assert 9_000 < path.stat().st_size <= 10_000
    steps = [args["step"] for args in args_of(json.loads(path.read_text() + "]"), "step")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_killed_process_leaves_every_step_that_it_finished(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    script = """
        import os, signal, sys
        from tinyvllm import _core
        engine = _core.Engine(sys.argv[1], trace=sys.argv[2], num_blocks=40, num_threads=1)
        engine.add_request(0, [1, 2, 3], _core.SamplingParams(max_tokens=50, ignore_eos=True))
        for _ in range(5):
            engine.step()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(model), str(path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    events = json.loads(path.read_text() + "]")
    assert [args["step"] for args in args_of(events, "step")] == [1, 2, 3, 4, 5]


def test_the_llm_writes_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with LLM(trace=path, max_model_len=64) as llm:
        llm.generate(["Once upon a time"] * 3, use_tqdm=False)
    finished = args_of(json.loads(path.read_text()), "finished")
    assert [args["request"] for args in finished] == [0, 1, 2]


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, which prints four tokens of a story."""
    command = [sys.executable, "-m", "tinyvllm.cli", "generate", "--raw", "-p", "Once", "-n", "4"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_the_command_writes_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = generate("--trace", str(path), "--seed", "1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == generate("--seed", "1").stdout
    (finished,) = args_of(json.loads(path.read_text()), "finished")
    assert finished["output_tokens"] == 4


def test_the_command_refuses_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    result = generate("--trace", str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"The trace file {tmp_path} cannot be written: Is a directory" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is Linux'")
def test_the_command_says_once_that_the_trace_ended_early() -> None:
    result = generate("--trace", "/dev/full")
    assert (result.returncode, result.stderr.count("the trace /dev/full ends early")) == (0, 1)
    assert generate("--trace", "/dev/full", "--quiet").stderr == ""
