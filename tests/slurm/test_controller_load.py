"""What the controller is asked while a person waits or looks, counted by SLURM itself (sdiag)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter

import pytest
import yaml
from fake.fake_slurm import HEADER
from support import RAY_SLURM, controller_requests, wait_for

from ray_slurm_provider.slurm.client import squeue_argv

pytestmark = [pytest.mark.slurm]

INTERVALS = 3
SECONDS_BETWEEN_LISTINGS = 5
# One squeue is one of the first two, and the third; root is answered by the request for everybody's jobs.
LISTING = ("REQUEST_JOB_USER_INFO", "REQUEST_JOB_INFO")
WITH_EACH_LISTING = "REQUEST_PARTITION_INFO"
CONFIGURATION = "REQUEST_BUILD_INFO"


class Count:
    """Requests and seconds since it was made."""

    def __init__(self, cluster):
        self._sdiag = lambda: cluster.client.tools.run(["sdiag"]).stdout
        self._before = controller_requests(self._sdiag())
        self._began = time.monotonic()

    def requests(self):
        return Counter(controller_requests(self._sdiag())) - Counter(self._before)

    def listings(self):
        requests = self.requests()
        return sum(requests[kind] for kind in LISTING)

    def most_listings(self):
        return (time.monotonic() - self._began) // SECONDS_BETWEEN_LISTINGS + 1


@pytest.fixture
def waiting(make_cluster):
    """A cluster whose `ray up` waits for a head that does not begin."""
    later = {"sbatch": {"cpus_per_task": 1, "mem": "1G", "begin": "now+1hour"}}
    cluster = make_cluster("watched", head={"node_config": later})
    cluster.begun = Count(cluster)
    cluster.child = cluster.start("up", cluster.yaml, "--no-config-cache", "-y")
    wait_for(lambda: any(job.queued for job in cluster.jobs()), 60, "the head in the queue")
    wait_for(lambda: "PENDING" in cluster.child.stdout.readline(), 60, "what `ray up` says of it", poll_s=0)
    return cluster


def _interrupt(child):
    child.send_signal(signal.SIGINT)
    child.wait(30)
    return child.returncode


@pytest.mark.cluster
def test_ray_up_that_waits_and_a_watched_table_ask_for_their_own_jobs_once_in_five_seconds(waiting):
    during_up = Count(waiting)
    wait_for(lambda: during_up.listings() >= INTERVALS, 60, "some listings of `ray up`")
    asked, most = during_up.listings(), during_up.most_listings()
    assert asked <= most
    assert set(during_up.requests()) <= {*LISTING, WITH_EACH_LISTING}
    assert waiting.child.poll() is None
    assert _interrupt(waiting.child) != 0
    assert waiting.begun.requests()[CONFIGURATION] <= 1

    watched = Count(waiting)
    watch = subprocess.Popen(
        [*RAY_SLURM, "nodes", "--watch", str(waiting.yaml)], env=waiting.environ, stdout=subprocess.PIPE, text=True
    )
    waiting.children.append(watch)
    wait_for(lambda: watched.listings() >= INTERVALS, 60, "some listings of the table")
    asked, most, requests = watched.listings(), watched.most_listings(), watched.requests()
    assert asked <= most
    assert requests[CONFIGURATION] <= 1
    assert set(requests) <= {*LISTING, WITH_EACH_LISTING, CONFIGURATION}
    assert _interrupt(watch) == 0
    assert "waits: reason BeginTime" in watch.stdout.read()


def test_deploy_asks_whether_a_job_would_run_at_most_twenty_times_for_a_node_type(make_cluster, tmp_path):
    cluster = make_cluster("deployed")
    count = Count(cluster)
    target = tmp_path / "deployed.yaml"
    done = subprocess.run(
        [*RAY_SLURM, "deploy", "--yes", "-o", target], env=cluster.environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    types = yaml.safe_load(target.read_text())["available_node_types"]
    assert 1 <= count.requests()["REQUEST_JOB_WILL_RUN"] <= 20 * len(types)


def test_squeue_asks_for_ones_own_jobs_and_prints_the_header_that_the_tests_know(make_cluster):
    cluster = make_cluster("header")
    argv = squeue_argv()
    assert argv[argv.index("--user") + 1] == str(os.getuid())
    assert cluster.client.tools.run(argv).stdout.splitlines()[0] == HEADER
