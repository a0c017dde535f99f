"""A training of several processes: a fault is reported once, with the rank where it began, and nothing hangs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from attncli.api import replay_capsule
from attncli.training import processes
from attncli.training.processes import Alone, CollectiveError, Meeting, Settled
from attncli.training.shards import owner

FOLDER = Path(__file__).parent / "training_scripts" / "processes"
LINE = "tests/training_scripts/processes"

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), str(FOLDER))),
        "PYTHONIOENCODING": "utf-8",
    }


def launched(world: int, command: Sequence[str], folder: Path, timeout: float = 150) -> list[Ended]:
    """What each rank left. `command`: without the Python that runs it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    started = []
    for rank in range(world):
        variables = {**environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        out, err = (folder / f"{name}.{rank}" for name in ("stdout", "stderr"))
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=variables, stdout=stdout, stderr=stderr
            )
        started.append((process, out, err))
    try:
        codes = [process.wait(timeout) for process, _, _ in started]
    finally:
        for process, _, _ in started:
            process.kill()
            process.wait()
    return [
        Ended(code, out.read_text("utf-8"), err.read_text("utf-8"))
        for code, (_, out, err) in zip(codes, started, strict=True)
    ]


class Scenario(NamedTuple):
    """What the ranks said of one scenario, by rank."""

    ranks: list[dict[str, Any]]

    @property
    def report(self) -> dict[str, Any]:
        """The report, which is the same in all ranks, and shown by one."""
        assert sum(said["speaks"] for said in self.ranks) == 1
        assert all(said["report"] == self.ranks[0]["report"] for said in self.ranks)
        report: dict[str, Any] = self.ranks[0]["report"]
        return report

    @property
    def training(self) -> dict[str, Any]:
        return self.report["run"]["training"]  # type: ignore[no-any-return]

    @property
    def fault(self) -> dict[str, Any]:
        return self.training["fault"]  # type: ignore[no-any-return]

    @property
    def origin(self) -> dict[str, Any]:
        (origin,) = self.report["origins"]
        return origin  # type: ignore[no-any-return]


Scenarios = Callable[[str], Scenario]


def _scenarios(world: int, names: Sequence[str], folder: Path) -> Scenarios:
    ended = launched(world, [str(FOLDER / "scenarios.py"), *names], folder)
    for one in ended:
        assert one.code == 0, one.err
    lines = [[json.loads(line) for line in one.out.splitlines()] for one in ended]
    found = {rows[0]["scenario"]: Scenario([row for row in rows if row]) for rows in zip(*lines, strict=True)}
    for name, scenario in found.items():
        assert not any("the watch failed" in str(said.get("told")) for said in scenario.ranks), name
        assert [said["rank"] for said in scenario.ranks] == list(range(world))
        assert all(said["seconds"] < 30 for said in scenario.ranks)
    return found.__getitem__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def replicas(folder: Path) -> Scenarios:
    """Four processes with a model in DistributedDataParallel."""
    faults = ("none:plain", "none", "batch:capsule", "loss", "backward", "accumulation", "clip", "update")
    faults = (*faults, "scaler", "collective", "batch:continue", "batch:plain")
    return _scenarios(4, [f"replicas:main:{fault}" for fault in faults], folder)


@pytest.fixture(scope="module")
def parts(folder: Path) -> Scenarios:
    """Two processes with a model whose parameters are divided between them."""
    faults = (
        "none:plain",
        "none",
        "clips:plain",
        "clips",
        "batch",
        "backward",
        "half",
        "clip",
        "shard",
        "update",
    )
    names = [f"parts:fsdp:{fault}" for fault in faults]
    names += [f"parts:flattened:{fault}" for fault in ("none:plain", "none", "batch")]
    names += [f"parts:tensor_parallel:{fault}" for fault in ("none:plain", "none", "shard")]
    return _scenarios(2, names, folder)


# --- replicas -----------------------------------------------------------------------------------------


def test_a_healthy_run_of_replicas_ends_with_the_same_bits(replicas: Scenarios) -> None:
    watched, plain = replicas("replicas:main:none"), replicas("replicas:main:none:plain")
    assert {said["digest"] for said in (*watched.ranks, *plain.ranks)} == {plain.ranks[0]["digest"]}
    assert [said["speaks"] for said in watched.ranks] == [True, False, False, False]
    training = watched.ranks[0]["report"]["run"]["training"]
    assert (training["world"], training["seen"], training["fault"]) == (4, 4, None)


def test_a_bad_sample_in_one_rank_is_named_with_its_rank_batch_and_element(replicas: Scenarios) -> None:
    found = replicas("replicas:main:batch:capsule")
    fault, origin = found.fault, found.origin
    assert (fault["step"], fault["seen"], fault["rank"], fault["withheld"]) == (3, "loss", 2, True)
    assert fault["batch"]["index"] == 2
    assert fault["batch"]["items"] == [34, 38, 42, 46]
    assert (origin["cause"], origin["tensor"], origin["confirmed"]) == ("bad-input", "x", True)
    assert origin["at"] == {"index": [1, 3]}
    assert [row["origins"] for row in found.training["ranks"]] == [0, 0, 1, 0]
    assert [said["speaks"] for said in found.ranks] == [True, False, False, False]
    assert "2 of 4 processes, counted from 0; it began there" in found.ranks[0]["text"]
    assert "shows it in rank 2 and not in ranks 0, 1 and 3" in found.report["notes"][-1]


def test_the_capsule_is_that_of_the_rank_where_it_began(replicas: Scenarios, folder: Path) -> None:
    found = replicas("replicas:main:batch:capsule")
    assert found.training["capsule"] == "capsule-batch"
    written = json.loads((folder / "capsule-batch" / "capsule.json").read_text())
    assert written["facts"]["training"]["fault"]["batch"]["items"] == [34, 38, 42, 46]
    again = replay_capsule(str(folder / "capsule-batch"))
    assert [(one.cause, dict(one.at or {})) for one in again.origins] == [("bad-input", {"index": [1, 3]})]


def test_a_loss_that_is_bad_in_one_rank_alone_stops_all_of_them(replicas: Scenarios) -> None:
    found = replicas("replicas:main:loss")
    assert (found.fault["step"], found.fault["seen"], found.fault["rank"]) == (3, "loss", 2)
    assert (found.origin["op"], found.origin["module"]) == ("log", "")
    assert f"{LINE}/replicas.py" in found.origin["source"]
    # The gradients of the other ranks stayed finite.
    assert [row["seen"] for row in found.training["ranks"]] == [None, None, "loss", None]


def test_a_fault_of_the_backward_pass_of_one_rank_is_named(replicas: Scenarios) -> None:
    found = replicas("replicas:main:backward")
    assert (found.fault["seen"], found.fault["rank"]) == ("gradient", 2)
    assert (found.origin["phase"], found.origin["op"], found.origin["cause"]) == (
        "backward",
        "div",
        "division-by-zero",
    )
    assert [row["seen"] for row in found.training["ranks"]] == ["gradient"] * 4


def test_a_bad_micro_batch_is_named_though_others_follow_it(replicas: Scenarios) -> None:
    found = replicas("replicas:main:accumulation")
    assert (found.fault["step"], found.fault["rank"], found.fault["batch"]["index"]) == (3, 2, 4)
    assert found.fault["batch"]["items"] == [66, 70, 74, 78]
    assert found.origin["at"] == {"index": [1, 3]}


def test_clipping_that_spreads_a_bad_gradient_is_stopped_before(replicas: Scenarios) -> None:
    found = replicas("replicas:main:clip")
    assert (found.fault["step"], found.fault["rank"], found.origin["cause"]) == (3, 2, "bad-input")


def test_a_bad_update_of_all_ranks_is_reported_once_and_of_no_rank(replicas: Scenarios) -> None:
    found = replicas("replicas:main:update")
    assert (found.fault["step"], found.fault["seen"], found.fault["rank"]) == (3, "parameter", None)
    assert found.report["notes"][-1] == "each of the 4 processes shows it"


def test_a_bad_loss_is_seen_in_all_ranks_though_a_loss_scaler_skips_the_step(replicas: Scenarios) -> None:
    found = replicas("replicas:main:scaler")
    assert (found.fault["step"], found.fault["seen"], found.fault["rank"]) == (3, "loss", 2)
    assert found.origin["cause"] == "bad-input"


def test_a_run_that_goes_on_ends_as_it_would_and_is_reported_once(replicas: Scenarios) -> None:
    watched, plain = replicas("replicas:main:batch:continue"), replicas("replicas:main:batch:plain")
    assert [said["digest"] for said in watched.ranks] == [said["digest"] for said in plain.ranks]
    assert plain.ranks[0]["digest"] is not None
    assert sum(said["speaks"] for said in watched.ranks) == 1
    assert watched.ranks[0]["report"]["run"]["training"]["fault"]["rank"] == 2


def test_a_step_that_talks_to_other_processes_is_not_repeated_and_its_rank_is_named(
    replicas: Scenarios,
) -> None:
    found = replicas("replicas:main:collective")
    assert (found.fault["rank"], found.fault["reproduced"]) == (2, None)
    assert "allreduce talks to the other processes" in found.fault["why"]
    assert found.fault["batch"]["items"] == [34, 38, 42, 46]


# --- parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parts:fsdp:none", "parts:fsdp:clips", "parts:tensor_parallel:none"])
def test_a_healthy_run_of_parts_ends_with_the_same_bits(parts: Scenarios, name: str) -> None:
    watched, plain = parts(name), parts(f"{name}:plain")
    assert [said["digest"] for said in watched.ranks] == [said["digest"] for said in plain.ranks]
    steps = watched.ranks[0]["report"]["run"]["training"]["steps"]
    # The norm of all parts, and the same in all ranks.
    assert [step["gradient_norm"] for step in steps] == pytest.approx(
        [step["gradient_norm"] for step in watched.ranks[1]["report"]["run"]["training"]["steps"]]
    )


def test_of_a_flattened_model_the_rank_and_the_batch_are_named_and_no_origin_is_made_up(
    parts: Scenarios,
) -> None:
    watched, plain = parts("parts:flattened:none"), parts("parts:flattened:none:plain")
    assert [said["digest"] for said in watched.ranks] == [said["digest"] for said in plain.ranks]
    found = parts("parts:flattened:batch")
    assert (found.fault["step"], found.fault["seen"], found.fault["rank"]) == (3, "loss", 1)
    assert found.fault["batch"]["items"] == [13, 15, 17]
    assert (found.fault["reproduced"], found.report["origins"]) == (None, [])
    assert "FullyShardedDataParallel holds its parameters in parts" in found.fault["why"]


@pytest.mark.parametrize("fault", ["batch", "clip"])
def test_a_bad_sample_of_one_rank_is_found_in_a_divided_model(parts: Scenarios, fault: str) -> None:
    found = parts(f"parts:fsdp:{fault}")
    assert (found.fault["step"], found.fault["seen"], found.fault["rank"]) == (3, "loss", 1)
    assert found.fault["batch"]["items"] == [13, 15, 17]
    assert (found.origin["tensor"], found.origin["at"]) == ("gain", {"index": [2]})
    assert found.origin["confirmed"] is True


def test_a_gradient_that_is_bad_in_one_part_stops_the_ranks_that_hold_others(parts: Scenarios) -> None:
    found = parts("parts:fsdp:backward")
    assert (found.fault["seen"], found.fault["rank"]) == ("gradient", 1)
    assert found.fault["tensors"] == ["embed.weight"]
    assert (found.origin["phase"], found.origin["cause"]) == ("backward", "division-by-zero")


def test_what_overflows_in_the_dtype_of_a_divided_model_overflows_again(parts: Scenarios) -> None:
    found = parts("parts:fsdp:half")
    assert (found.fault["seen"], found.fault["rank"]) == ("loss", 1)
    assert (found.origin["dtype"], found.origin["phase"]) == ("float16", "forward")
    assert found.origin["cause"].startswith("overflow")


def test_a_gradient_spoiled_in_one_part_is_told_by_all_and_has_no_origin(parts: Scenarios) -> None:
    found = parts("parts:fsdp:shard")
    assert (found.fault["tensors"], found.fault["reproduced"]) == (["up.weight"], False)
    assert found.report["origins"] == []


def test_a_bad_update_of_parts_is_told_with_the_reason_why_it_was_not_repeated(parts: Scenarios) -> None:
    found = parts("parts:fsdp:update")
    assert (found.fault["step"], found.fault["seen"], found.fault["reproduced"]) == (3, "parameter", None)
    assert (
        found.fault["why"] == "an update of parameters that lie in parts in several processes is not repeated"
    )
    assert found.fault["withheld"] is True


def test_a_bad_number_in_the_shard_of_one_rank_is_named_by_its_place_and_rank(parts: Scenarios) -> None:
    found = parts("parts:tensor_parallel:shard")
    assert (found.fault["step"], found.fault["rank"]) == (3, 1)
    assert (found.origin["tensor"], found.origin["at"]) == ("up.weight", {"index": [10, 4]})
    assert "what is bad of up.weight lies in the part of rank 1" in found.report["notes"]


# --- the command line ---------------------------------------------------------------------------------

REPLICAS = str(FOLDER / "replicas.py")
NAN_CHECK = ["-m", "attncli", "nan-check"]


def test_a_healthy_script_prints_what_it_prints_and_rank_0_adds_one_line(tmp_path: Path) -> None:
    plain = launched(2, [REPLICAS], tmp_path)
    options = ["--every", "2", "--log", "run.jsonl", "-o", "report.json"]
    watched = launched(2, [*NAN_CHECK, *options, REPLICAS], tmp_path)
    assert [(one.code, one.out) for one in watched] == [(0, one.out) for one in plain]
    assert [one.err for one in watched] == ["attncli: 4 steps watched, nothing went wrong\n", ""]
    for name in ("run.jsonl", "run.rank1.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4]
    assert json.loads((tmp_path / "report.json").read_text())["run"]["training"]["world"] == 2


def test_torchrun_shows_one_report_and_fails(tmp_path: Path) -> None:
    # Behind -- torchrun leaves options alone: it would take --log for one of its own.
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = [
        sys.executable,
        *run,
        *NAN_CHECK[1:],
        "--every",
        "0",
        "--log",
        "run.jsonl",
        REPLICAS,
        "--fault",
        "batch",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stdout.count("Training stopped in step 3 (epoch 0, batch 2 of DataLoader over TensorDataset")
        == 1
    )
    assert done.stdout.count("1 of 2 processes, counted from 0; it began there") == 1
    assert done.stdout.count("with 0 in place of the bad elements of x: the symptom is gone") == 1
    assert "attncli:" not in done.stderr
    assert "exitcode  : 1" in done.stderr
    assert "Signal" not in done.stdout


def test_an_error_of_one_rank_passes_through_with_its_step_and_batch(tmp_path: Path) -> None:
    first, second = launched(2, [*NAN_CHECK, REPLICAS, "--fault", "label"], tmp_path)
    assert (first.code, second.code) == (1, 1)
    assert "IndexError: Target 7 is out of bounds." in second.err
    assert "attncli: the script in rank 1 raised IndexError in step 3" in second.err
    assert "cross_entropy was given label 7 at [2], of 3 classes" in second.err
    assert first.out == second.out == ""


def test_a_rank_that_dies_leaves_the_others_to_their_own_error(tmp_path: Path) -> None:
    first, second = launched(2, [*NAN_CHECK, REPLICAS, "--fault", "dies"], tmp_path, timeout=60)
    assert second.code == 9
    assert first.code == 1
    assert "attncli: the script in rank 0 raised" in first.err
    assert "gloo" in first.err


def test_what_one_rank_alone_sees_is_reported_once(tmp_path: Path) -> None:
    ended = launched(2, [*NAN_CHECK, REPLICAS, "--fault", "replica"], tmp_path, timeout=60)
    out = "".join(one.out for one in ended)
    assert out.count("Training stopped in step 3 ") == 1
    assert "1 of 2 processes, counted from 0; it began there" in out
    assert "of 2 processes it was seen in rank 1 alone, and no repetition shows it" in out
    assert [one.code for one in ended] == [1, 1]


# --- meetings -----------------------------------------------------------------------------------------


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ARRIVAL_SECONDS", 0.5)
    monkeypatch.setattr(processes, "SILENT_SECONDS", 0.4)
    monkeypatch.setattr(processes, "REPORT_SECONDS", 0.5)
    monkeypatch.setattr(processes, "_BEAT_SECONDS", 0.05)


def settled(store: Any, ranks: Sequence[int], world: int) -> dict[int, Settled]:
    """How a meeting of these ranks ends, each a thread. Whoever comes tells its rank; the highest is chosen."""
    found: dict[int, Settled] = {}

    def comes(rank: int) -> None:
        meeting = Meeting(store, "attncli/0/7", "attncli/0/left", rank, world)
        pulse = threading.Thread(target=meeting.beat)
        pulse.start()
        found[rank] = meeting.settle({"rank": rank}, max)
        meeting.over.set()
        pulse.join()

    threads = [threading.Thread(target=comes, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found


@pytest.mark.usefixtures("limits")
class TestMeetings:
    def test_all_hear_the_same_and_rank_0_speaks(self) -> None:
        found = settled(torch.distributed.HashStore(), [0, 1, 2], 3)
        told = {rank: {"rank": rank} for rank in range(3)}
        assert found == {rank: Settled(told, 2, rank == 0, ()) for rank in range(3)}

    def test_another_speaks_where_rank_0_does_not_come(self) -> None:
        found = settled(torch.distributed.HashStore(), [1, 2], 3)
        assert sum(one.speaks for one in found.values()) == 1
        assert {(one.chosen, one.missing) for one in found.values()} == {(2, (0,))}

    def test_who_has_left_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "ARRIVAL_SECONDS", 1000.0)
        store = torch.distributed.HashStore()
        for rank in (0, 3):
            store.set(f"attncli/0/left/{rank}", "1")
        found = settled(store, [1, 2], 4)
        assert {(one.chosen, one.missing) for one in found.values()} == {(2, (0, 3))}
        assert sum(one.speaks for one in found.values()) == 1

    def test_who_came_and_died_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "ARRIVAL_SECONDS", 1000.0)
        store = torch.distributed.HashStore()
        store.add("attncli/0/7/pulse/1", 3)
        found = settled(store, [0, 2], 3)
        assert {rank: (one.chosen, one.speaks, one.missing) for rank, one in found.items()} == {
            0: (2, True, (1,)),
            2: (2, False, (1,)),
        }

    def test_another_speaks_where_the_one_that_decides_dies(self) -> None:
        store = torch.distributed.HashStore()
        store.add("attncli/0/7/pulse/0", 3)
        store.add("attncli/0/7/chair/0/taken", 1)
        store.set("attncli/0/7/chair/0", "0")
        found = settled(store, [1, 2], 3)
        assert sum(one.speaks for one in found.values()) == 1
        assert {(one.chosen, one.missing) for one in found.values()} == {(2, (0,))}

    def test_without_the_store_each_reports_its_own(self) -> None:
        class Gone:
            def __getattr__(self, name: str) -> Any:
                raise RuntimeError("Connection reset by peer")

        assert settled(Gone(), [1], 3) == {1: Settled({1: {"rank": 1}}, 1, True, (0, 2))}

    def test_who_does_not_speak_ends_after_who_does_or_the_limit(self) -> None:
        store = torch.distributed.HashStore()
        speaker, other = (Meeting(store, "attncli/0/7", "attncli/0/left", rank, 2) for rank in (0, 1))
        speaker._speaker = other._speaker = 0
        waiting = threading.Thread(target=other.end)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        speaker.end()
        waiting.join(5)
        assert not waiting.is_alive()
        other._speaker = 2
        store.delete_key("attncli/0/7/reported")
        other.end()  # the limit


def test_no_collective_is_called_where_a_process_repeats_alone() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        numbers = torch.ones(2)
        with Alone():  # type: ignore[no-untyped-call]
            assert float((numbers * 2).sum()) == 4.0
            with pytest.raises(CollectiveError, match="allreduce talks to the other processes"):
                torch.distributed.all_reduce(numbers)
            with pytest.raises(CollectiveError, match="barrier"):
                torch.distributed.barrier()
        torch.distributed.all_reduce(numbers)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("placements", "index", "rank"),
    [
        ([Shard(0), Shard(1)], [0, 0], 10),
        ([Shard(0), Shard(1)], [5, 3], 13),
        ([Shard(1), Shard(0)], [5, 1], 11),
        ([Shard(0), Replicate()], [5, 3], None),
        ([Shard(0), Shard(0)], [5, 3], None),
        ([Shard(0), Shard(1)], [5], None),
    ],
)
def test_the_owner_of_an_element_is_the_rank_that_holds_its_shard(
    placements: list[Any], index: list[int], rank: int | None
) -> None:
    """A tensor of 6 × 4 on ranks 10 to 13, two by two: three rows and two columns each."""
    mesh = SimpleNamespace(mesh=torch.tensor([[10, 11], [12, 13]]), size=lambda dimension: 2)
    shape = (6, 4)
    tensor = SimpleNamespace(
        device_mesh=mesh, placements=placements, shape=shape, dim=lambda: 2, to_local=lambda: None
    )
    assert owner(tensor, index) == rank
