"""Rounds of Ray's autoscaler v2 with simulated workers: which part of them is the provider's."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from fake.fake_slurm import HEADER
from ray.autoscaler.v2.autoscaler import Autoscaler
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply, NodeStatus
from support import cluster_config

from benchmarks.bed import HEAD, WORKER
from benchmarks.results import Result
from ray_slurm_provider import bootstrap
from ray_slurm_provider.birth_certificate import BirthCertificate
from ray_slurm_provider.cluster_dir import ClusterDir
from ray_slurm_provider.ray_contract import prepare_config
from ray_slurm_provider.reports import READY, NodeReport, write_report
from ray_slurm_provider.slurm.parse import SEPARATOR

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD_ID = "1-aaaaaa"
_WARM_UP = 4
_ROUNDS = 8


def reconciler(sizes: list[int]) -> list[Result]:
    """Measure rounds over a cluster at rest, and rounds in which SLURM is asked each time."""
    logging.disable(logging.WARNING)
    results = []
    for size in sizes:
        for name, asks in (("at rest", False), ("asking each time", True)):
            rounds, shares = _measure(size, asks=asks)
            share = 100 * sum(shares) / sum(rounds)
            results += [
                Result(f"autoscaler's round, {size} workers, {name}", "s", None, statistics.median(rounds)),
                Result(
                    f"provider's share of it, {size} workers, {name}", "%", None, share, None, "<= 10 %", share <= 10
                ),
            ]
    return results


def _measure(size: int, *, asks: bool) -> tuple[list[float], list[float]]:
    """Return the seconds of each round, and how many of them were the provider's."""
    with _cluster(size) as config:

        class Reader:
            def get_cached_autoscaling_config(self) -> AutoscalingConfig:
                return AutoscalingConfig(config)

            def refresh_cached_autoscaling_config(self) -> None:
                pass

        autoscaler = Autoscaler("benchmark", Reader(), _Gcs(size))
        adapter = autoscaler._cloud_instance_provider  # noqa: SLF001 the border to the provider
        cluster = adapter.v1_provider._cluster  # noqa: SLF001
        spent = 0.0

        def timed(question: Any) -> Any:
            def ask() -> Any:
                nonlocal spent
                began = time.perf_counter()
                answer = question()
                spent += time.perf_counter() - began
                return answer

            return ask

        adapter.get_non_terminated = timed(adapter.get_non_terminated)
        rounds, shares = [], []
        for _ in range(_WARM_UP + _ROUNDS):
            spent = 0.0
            if asks:
                cluster.forget_listing()
            else:
                # What is shared for a second would not be asked for at all.
                cluster._listing.invalidate_view()  # noqa: SLF001
            began = time.perf_counter()
            state = autoscaler.update_autoscaling_state()
            rounds.append(time.perf_counter() - began)
            shares.append(spent)
            if state is None or len(cluster.nodes()) != size + 1:
                raise RuntimeError("the autoscaler did not see its nodes")
        return rounds[_WARM_UP:], shares[_WARM_UP:]


@contextmanager
def _cluster(size: int) -> Iterator[dict[str, Any]]:
    """Make the directory of a cluster, and a squeue that lists its jobs; give its configuration."""
    with tempfile.TemporaryDirectory(prefix="rsb-") as place:
        root = Path(place)
        directory = ClusterDir(root / "state", "bench")
        directory.prepare()
        certificates = [BirthCertificate("bench", directory.fingerprint, "aaaaaa", "", HEAD)]
        certificates += [
            BirthCertificate("bench", directory.fingerprint, _token(number), _HEAD_ID, WORKER) for number in range(size)
        ]
        rows = [HEADER]
        for number, certificate in enumerate(certificates, 1):
            row = [
                str(number),
                "RUNNING",
                "None",
                "cpu",
                f"c{number}",
                "1-00:00:00",
                "N/A",
                "N/A",
                "ray",
                certificate.text(),
            ]
            rows.append(SEPARATOR.join(row))
            report = NodeReport(certificate.node_id(str(number)), READY, address=_address(number), ready_at=1)
            write_report(directory.reports, report, head=False)
        (root / "squeue.txt").write_text("".join(row + "\n" for row in rows))
        tools = root / "bin"
        tools.mkdir()
        (tools / "squeue").write_text(f"#!/bin/sh\nexec cat {root}/squeue.txt\n")
        (tools / "squeue").chmod(0o755)
        worker = {"max_workers": size, "resources": {"CPU": 1}, "node_config": {"sbatch": {"mem": "1G"}}}
        config = cluster_config("bench", root / "state", types={"worker": worker}, max_workers=size)
        environ = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            "RAY_SLURM_GCS_ADDRESS": "127.0.0.1:1",
            "RAY_SLURM_DIR": str(directory.root),
            "RAY_enable_autoscaler_v2": "1",
        }
        with mock.patch.dict(os.environ, environ):
            os.environ.pop("SLURM_CONF", None)
            yield bootstrap.resolve(prepare_config(config))


class _Gcs:
    """What Ray's GCS says of a cluster on which everything is busy."""

    address = "127.0.0.1:1"

    def __init__(self, size: int) -> None:
        reply = GetClusterResourceStateReply()
        state = reply.cluster_resource_state
        state.cluster_resource_state_version = 1
        for number in range(1, size + 2):
            node = state.node_states.add()
            node.node_id = number.to_bytes(28, "big")
            node.instance_id = _HEAD_ID if number == 1 else f"{number}-{_token(number - 2)}"
            node.ray_node_type_name = "head" if number == 1 else "worker"
            node.status = NodeStatus.RUNNING
            node.node_ip_address = _address(number)
            node.total_resources["CPU"] = 1
            node.available_resources["CPU"] = 0
        self._reply = reply.SerializeToString()

    def get_cluster_resource_state(self) -> bytes:
        """Return it as the GCS sends it."""
        return self._reply


def _token(number: int) -> str:
    return f"{number:06d}"


def _address(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
