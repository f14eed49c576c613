"""Whatever sbatch says and however it ends, each job that was wanted is submitted once."""

from __future__ import annotations

import itertools
import threading

import pytest

from fake.harness import EAGER, HEAD, WORKER, Clock
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import SlurmUnavailable, SubmitRejected, SubmitUnanswered
from ray_slurm_provider.nodes import TAG_TYPE
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools

CONFIG = NodeConfig()
FAILED = "sbatch: error: Batch job submission failed: "
RESET = {"err": f"{FAILED}Connection reset by peer\n"}
UNCLEAR = {
    "reset": RESET,
    "send failure": {"err": f"{FAILED}Unable to contact slurm controller (send failure)\n"},
    "second try": {
        "err": "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying.\n"
        f"{FAILED}Unable to contact slurm controller (connect failure)\n"
    },
    "time": {"err": f"{FAILED}Socket timed out on send/recv operation\n"},
    "no bytes": {"err": f"{FAILED}Zero Bytes were transmitted or received\n"},
    "unexpected": {"err": f"{FAILED}Unexpected message received\n"},
    "C library": {"err": f"{FAILED}Invalid argument\n"},
    "pipe": {"err": f"{FAILED}Broken pipe\n"},
    "no reason": {"err": f"{FAILED}Unspecified error\n"},
    "never heard of": {"err": "sbatch: error: the moon is in the wrong phase\n", "exit": 77},
    "a wrapper's own": {"err": "logger: invalid option -- 'x'\n", "out": "2\n", "exit": 1},
    "killed": {"signal": 9},
    "killed below a shell": {"err": "Killed\n", "exit": 137},
    "terminated": {"signal": 15},
    "segmentation fault": {"signal": 11},
    "swallowed": {"exit": 0},
    "other words": {"exit": 0, "out": "Thank you for your job!\n"},
}
REFUSALS = {
    f"{FAILED}Invalid partition name specified\n": "partition",
    f"{FAILED}Invalid account or account/partition combination specified\n": "account",
    f"{FAILED}Invalid generic resource (gres) specification\n": "gres",
    f"{FAILED}Requested node configuration is not available\n": "no-such-node",
    f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)\n": "time-limit",
    f"{FAILED}Access/permission denied\n": "permission",
    f"{FAILED}Pathname of a file, directory or other parameter too long\n": "refused",
    f"{FAILED}Job dependency problem\n": "refused",
    f"sbatch: error: AssocMaxSubmitJobLimit\n{FAILED}Job violates accounting/QOS policy (job submit limit)\n": "limit",
    # What a job_submit plugin says, and the code that it returns.
    f"sbatch: error: name a project, please\n{FAILED}Unspecified error\n": "refused",
    # The controller was asked again meanwhile.
    f"sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying.\n{FAILED}Invalid qos\n{FAILED}"
    "Invalid qos specification\n": "qos",
    # Nothing was sent.
    "/usr/bin/sbatch: unrecognized option '--frobnicate'\nTry \"sbatch --help\" for more information\n": "option",
    "Invalid time specification (pos=0): soon\nsbatch: error: Invalid --begin specification\n": "refused",
    "sbatch: error: Invalid --mem specification\n": "memory",
    "sbatch: error: Invalid generic resource (gres) specification\n": "gres",
    "sbatch: error: lua: no GPUs at night\nsbatch: error: cli_filter plugin terminated with error\n": "refused",
    "sbatch: fatal: --mem, --mem-per-cpu, and --mem-per-gpu are mutually exclusive.\n": "refused",
    "sbatch: error: This does not look like a batch script.\n": "refused",
}


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def make(fake_slurm, tmp_path, clock):
    """The cluster as `ray up` sees it; as the autoscaler does with a head."""

    def make(head="", **settings):
        settings = SlurmSettings(state_dir=str(tmp_path / "state"), default_python="/x", **{**EAGER, **settings})
        environ = fake_slurm.of_head(head) if head else fake_slurm.environ
        return Cluster("c", settings, environ, clock=clock, wall_clock=clock)

    return make


@pytest.fixture
def monitor(make, fake_slurm):
    head = make().create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")
    return make(head)


def _create(monitor, count, of_type="worker"):
    return monitor.create_workers(of_type, CONFIG, {**WORKER, TAG_TYPE: of_type}, count)


def _workers(cluster):
    return {node_id for node_id, node in cluster.nodes().items() if not node.is_head}


def _jobs(fake_slurm):
    """Those that were submitted; a head is one."""
    return len(fake_slurm.jobs()) - 1


@pytest.mark.parametrize("ending", UNCLEAR.values(), ids=UNCLEAR)
def test_jobs_that_slurm_took_all_the_same_are_used(monitor, fake_slurm, clock, ending):
    fake_slurm.faults(sbatch_ends={"submits": True, **ending})
    for _ in range(3):
        assert len(_create(monitor, 4)) == 4
        clock.now += 5
        monitor.launch_deferred()
    assert len(_workers(monitor)) == _jobs(fake_slurm) == 12


@pytest.mark.parametrize("ending", UNCLEAR.values(), ids=UNCLEAR)
def test_what_is_not_clear_is_told_in_sbatchs_words_and_not_repeated_at_once(monitor, fake_slurm, clock, ending):
    ending = {key: value for key, value in ending.items() if key != "out" or "exit" not in ending or not ending["exit"]}
    fake_slurm.faults(sbatch_ends=ending)
    with pytest.raises(SubmitUnanswered) as told:
        _create(monitor, 4)
    assert ending.get("err", "").strip() in str(told.value)
    asked = fake_slurm.calls("sbatch")
    assert asked == 2
    times = []
    for _ in range(50):
        assert _create(monitor, 1) == []  # Ray knows why
        clock.now += 2
        monitor.launch_deferred()
        if fake_slurm.calls("sbatch") > asked:
            asked = fake_slurm.calls("sbatch")
            times.append(clock.now - 1000)
    waits = [later - earlier for earlier, later in itertools.pairwise([0, *times])]
    assert len(waits) == 3
    assert 10 <= waits[0] <= 14
    assert all(later >= 1.5 * earlier for earlier, later in itertools.pairwise(waits))
    (said,) = monitor.launches.summary()
    assert "sbatch does not say whether it takes jobs of type worker; the next try is in" in said


@pytest.mark.parametrize("words", REFUSALS, ids=lambda words: words.rstrip().rpartition(": ")[2][:30])
def test_slurms_own_refusals_are_known(monitor, fake_slurm, words):
    fake_slurm.faults(sbatch_ends={"err": words})
    asked = fake_slurm.calls("squeue")
    with pytest.raises(SubmitRejected) as refused:
        SlurmClient(SlurmTools(environ=fake_slurm.environ)).submit("#!/bin/sh")
    assert refused.value.category == REFUSALS[words]
    assert fake_slurm.calls("squeue") == asked


def test_a_controller_that_cannot_be_reached_holds_nothing_up_and_leaves_no_record(make, fake_slurm):
    monitor = make(make().create_head("head", CONFIG, HEAD), birth_record="file")
    fake_slurm.faults(down=["sbatch"])
    for _ in range(2):
        with pytest.raises(SlurmUnavailable) as error:
            _create(monitor, 1)
        assert not isinstance(error.value, SubmitUnanswered)
    assert list(monitor.directory.births.iterdir()) == []
    fake_slurm.faults()
    assert _create(monitor, 1)


def test_jobs_that_squeue_shows_late_are_nodes_and_count_for_what_was_asked_since(monitor, fake_slurm, clock):
    fake_slurm.faults(late=True, sbatch_ends={"submits": True, **RESET})
    with pytest.raises(SubmitUnanswered):
        _create(monitor, 4)
    fake_slurm.faults()
    # Ray asks again for those that failed, and for another type.
    assert _create(monitor, 4) == []
    assert _create(monitor, 1, "other")
    clock.now += 5
    monitor.launch_deferred()
    for number in range(4):
        fake_slurm.change(f"2_{number}", forgotten=False)
    clock.now += 2
    monitor.launch_deferred()
    clock.now += 100
    monitor.launch_deferred()
    assert len(_workers(monitor)) == _jobs(fake_slurm) == 5
    # What is asked for now is more.
    assert len(_create(monitor, 2)) == 2
    assert len(_workers(monitor)) == _jobs(fake_slurm) == 7


def test_before_more_is_submitted_squeue_is_asked_once_more(monitor, fake_slurm, clock):
    fake_slurm.faults(late=True, sbatch_ends={"submits": True, **RESET})
    with pytest.raises(SubmitUnanswered):
        _create(monitor, 4)
    fake_slurm.faults()
    clock.now += 11
    monitor.nodes()
    for number in range(4):
        fake_slurm.change(f"2_{number}", forgotten=False)
    # The last listing does not hold them; Ray asks for one more.
    assert len(_create(monitor, 5)) == 5
    assert len(_workers(monitor)) == _jobs(fake_slurm) == 5


def test_an_squeue_that_fails_too_leaves_it_open(monitor, fake_slurm, clock):
    fake_slurm.faults(down=["squeue"], sbatch_ends={"submits": True, **RESET})
    with pytest.raises(SubmitUnanswered, match="Connection reset by peer"):
        _create(monitor, 4)
    assert _create(monitor, 4) == []
    fake_slurm.faults()
    for _ in range(5):
        clock.now += 10
        monitor.launch_deferred()
    assert len(_workers(monitor)) == _jobs(fake_slurm) == 4


@pytest.mark.parametrize("submits", [True, False])
def test_a_head_whose_submission_was_not_clear_is_found_or_told(make, fake_slurm, submits):
    fake_slurm.faults(sbatch_ends={"submits": submits, **RESET})
    if submits:
        head = make().create_head("head", CONFIG, HEAD)
        assert set(make().nodes()) == {head}
    else:
        with pytest.raises(
            SubmitUnanswered, match=r"(?s)Connection reset by peer.*if squeue shows it later, it is used"
        ):
            make().create_head("head", CONFIG, HEAD)


def test_a_head_that_squeue_shows_late_is_taken_up_by_the_next_ray_up(make, fake_slurm):
    fake_slurm.faults(late=True, sbatch_ends={"submits": True, **RESET})
    with pytest.raises(SubmitUnanswered):
        make().create_head("head", CONFIG, HEAD)
    fake_slurm.faults()
    fake_slurm.change(1, forgotten=False)
    assert make().create_head("head", CONFIG, HEAD) in make().nodes()
    assert len(fake_slurm.jobs()) == 1


@pytest.mark.parametrize("ending", UNCLEAR.values(), ids=UNCLEAR)
def test_a_record_goes_with_a_known_refusal_only(make, fake_slurm, clock, ending):
    head = make(birth_record="file").create_head("head", CONFIG, HEAD)
    monitor = make(head, birth_record="file")
    fake_slurm.faults(comment="billed", late=True, sbatch_ends={"submits": True, **ending})
    with pytest.raises(SubmitUnanswered):
        _create(monitor, 12)
    fake_slurm.faults()
    for number in range(12):
        fake_slurm.change(f"2_{number}", forgotten=False)
    clock.now += 10
    monitor.launch_deferred()
    assert len(_workers(monitor)) == 12
    records = list(monitor.directory.births.iterdir())
    fake_slurm.faults(refuse="Invalid qos specification")
    clock.now += 100
    with pytest.raises(SubmitRejected):
        _create(monitor, 1)
    assert list(monitor.directory.births.iterdir()) == records


def test_threads_that_create_and_list_see_every_job_and_none_twice(monitor, fake_slurm, clock):
    problems, made, stop = [], [], threading.Event()

    def create(of_type):
        try:
            for _ in range(5):
                new = _create(monitor, 3, of_type)
                made.extend(new)
                assert set(new) <= set(monitor.nodes())
        except BaseException as error:
            problems.append(error)

    def list_nodes():
        try:
            seen = set()
            while not stop.is_set():
                clock.now += 0.5
                now = _workers(monitor)
                assert seen <= now
                seen = now
                monitor.launch_deferred()
        except BaseException as error:
            problems.append(error)

    creators = [threading.Thread(target=create, args=(name,)) for name in ("a", "b", "c")]
    lister = threading.Thread(target=list_nodes)
    for thread in (lister, *creators):
        thread.start()
    for thread in creators:
        thread.join(120)
    stop.set()
    lister.join(60)
    assert problems == []
    assert len(made) == len(set(made)) == _jobs(fake_slurm) == 45
    assert _workers(monitor) == set(made)
