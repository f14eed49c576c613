"""Whatever stands in a file or comes from a tool: no traceback, and never a node that wrongly counts as gone."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from fake.fake_slurm import HEADER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_slurm_provider.backends.base import Launch
from ray_slurm_provider.backends.launch_script import job_spec, new_certificate
from ray_slurm_provider.backends.slurm_jobs import SlurmJobs
from ray_slurm_provider.birth_certificate import BirthCertificate, read_certificate
from ray_slurm_provider.birth_records import BirthRecords, token_in
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.cluster_dir import ClusterDir, Diary
from ray_slurm_provider.config import SlurmSettings, read_node_config, read_settings
from ray_slurm_provider.errors import ConfigError, SlurmError, SlurmParseError, StateError
from ray_slurm_provider.nodes import TAG_KIND, TAG_TYPE
from ray_slurm_provider.reports import NodeReport, read_report
from ray_slurm_provider.slurm import parse
from ray_slurm_provider.slurm.types import JobState

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_ALIVE = [state.label for state in JobState if state.meaning.value != "ended"]
_tmp_is_reused = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def _like(keys):
    """A mapping with some of these keys, and anything behind them."""
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), json_values, max_size=len(keys))


@given(st.text() | st.binary().map(lambda raw: raw.decode(errors="surrogateescape")))
def test_a_certificate_may_be_anything(text):
    for comment in (text, "ray-slurm:1:" + text):
        found = read_certificate(comment)
        assert found is None or isinstance(found, BirthCertificate)


@given(_like(["c", "d", "t", "h", "g"]))
def test_a_certificate_may_hold_anything(body):
    found = read_certificate("ray-slurm:1:" + json.dumps(body))
    assert found is None or all(isinstance(value, str) for value in found.tags.values())


@_tmp_is_reused
@given(_like([*NodeReport._fields]) | json_values)
def test_a_report_may_hold_anything(tmp_path, value):
    (tmp_path / "report.json").write_text(json.dumps(value))
    found = read_report(tmp_path / "report.json")
    if found is not None:
        assert isinstance(found.gcs_address + found.client_address, str)


@_tmp_is_reused
@given(st.binary())
def test_a_report_may_be_anything(tmp_path, raw):
    (tmp_path / "report.json").write_bytes(raw)
    assert read_report(tmp_path / "report.json") is None


@_tmp_is_reused
@given(st.binary() | (_like(["version", "tags", "launches"]) | json_values).map(lambda v: json.dumps(v).encode()))
def test_the_diary_may_be_anything(tmp_path, raw):
    directory = ClusterDir(tmp_path, "c")
    directory.prepare()
    (directory.root / "state.json").write_bytes(raw)
    try:
        with directory.change_diary() as diary:
            assert isinstance(diary, Diary)
            diary.tags["1-a"] = {"x": "y"}
    except StateError as error:
        assert "newer" in str(error)
        assert (directory.root / "state.json").read_bytes() == raw
    else:
        assert directory.diary().tags["1-a"] == {"x": "y"}


@given(_like([*SlurmSettings.model_fields]) | json_values)
def test_settings_may_be_anything(section):
    try:
        read_settings(section)
    except ConfigError as error:
        assert str(error)


@given(
    _like(["sbatch", "env", "setup", "placement", "ray_start_args", "max_queued_jobs", "sbatch_extra"]) | json_values
)
def test_a_node_config_may_be_anything(section):
    try:
        read_node_config(section, "x")
    except ConfigError as error:
        assert str(error)


_names = st.lists(
    st.sampled_from(
        [" Mem=1T", " JobState=FAILED", " UserId=a(1) ", " Comment=x", " StdErr=", '"}', " ", "|", "é", "'"]
    )
    | st.text(st.characters(exclude_categories=["C", "Z"]), max_size=9)
).map("".join)
_RECORD = (
    "JobId=7 JobName={name} UserId=u(1) GroupId=u(1) JobState=PENDING Reason={reason} ExitCode=0:0 NodeList= TRES=cpu=2,"
    "mem=512M Command=(null) WorkDir=/home/a b Comment={comment}  StdErr=/a b/x=1.log StdIn=/dev/null StdOut=/o Power= \n"
)


@given(_names, _names, _names, st.sampled_from(["comment", "file"]))
def test_no_name_of_a_node_type_hides_what_scontrol_and_squeue_say_of_its_job(node_type, tag, reason, place):
    settings = SlurmSettings(birth_record=place)
    launch = Launch(
        "c a=b", "d", Path("/d"), settings, node_type, read_node_config({}, "x"), {TAG_TYPE: node_type, tag: tag}
    )
    certificate = new_certificate(launch)
    try:
        spec = job_spec(launch, certificate)
    except ConfigError as error:
        assert "1024" in str(error)
        return
    comment = spec.comment or "(null)"
    facts = parse.parse_show(_RECORD.format(name=spec.job_name, reason="JobHeldUser", comment=comment))
    assert (facts["JobName"], facts["Comment"], facts["JobState"]) == (spec.job_name, comment, "PENDING")
    assert (facts["TRES"], facts["StdOut"], facts["WorkDir"]) == ("cpu=2,mem=512M", "/o", "/home/a b")
    row = ["7", "PENDING", reason, "cpu", "", "1:00", "N/A", "N/A", spec.job_name, comment]
    (job,) = parse.parse_squeue(f"{HEADER}\n" + "\x1f".join(row) + "\n")
    assert (job.name, job.comment, job.reason) == (spec.job_name, spec.comment, reason)
    found = certificate.token if place == "file" else read_certificate(facts["Comment"])
    assert found == (token_in(facts["JobName"]) if place == "file" else certificate)


def test_the_comment_of_a_job_that_an_older_release_submitted_is_read_whole():
    comment = 'ray-slurm:1:{"c":"c","d":"d","g":{"t":"big Mem=1T"},"h":"","t":"tok123"}'
    facts = parse.parse_show(_RECORD.format(name="ray-c-big Mem=1T", reason="None", comment=comment))
    assert read_certificate(facts["Comment"]).tags == {"t": "big Mem=1T"}
    assert (facts["JobState"], facts["StdOut"]) == ("PENDING", "/o")


_words = st.sampled_from(["7", "7_3", "7_[0-3,5]", "7_[0,2", "8+1", *JobState.__members__, "(null)"]) | st.text()
_rows = st.lists(st.lists(_words, min_size=9, max_size=11).map("\x1f".join)).map("\n".join)


@given(
    st.sampled_from([HEADER + "\n", "Welcome!\n" + HEADER + "\n", ""]), _rows | st.text(), st.sampled_from(["\n", ""])
)
def test_squeue_may_print_anything(header, rows, end):
    try:
        jobs = parse.parse_squeue(header + rows + end)
    except ValueError as error:
        assert str(error).startswith(("the last line is", "there is no header", "the elements of an array"))
    else:
        assert all(isinstance(job.state, JobState) and list(job.elements()) for job in jobs)


class _Controller:
    """What SLURM really knows, and what squeue makes of it."""

    def __init__(self):
        self.states = {}
        self.mutilate = lambda text: text

    def row(self, job_id):
        tags = {TAG_KIND: "worker", TAG_TYPE: "w"}
        comment = BirthCertificate("c", self.home, f"tok{int(job_id):03}", "", tags).text()
        return "\x1f".join([job_id, self.states[job_id], "None", "cpu", "", "1:00", "N/A", "N/A", "ray-c-w", comment])

    def jobs(self):
        text = "\n".join([HEADER, *map(self.row, self.states)]) + "\n"
        try:
            return parse.parse_squeue(self.mutilate(text))
        except ValueError as error:
            raise SlurmParseError(["squeue"], 0, "", str(error)) from error

    def array_facts(self, number):
        if number not in self.states:
            return []
        return [{"JobId": number, "Comment": self.row(number).rpartition("\x1f")[2], "JobName": "ray-c-w"}]


_mutilations = st.one_of(
    st.just(lambda text: text),
    st.integers(0, 3000).map(lambda end: lambda text: text[:end]),
    st.integers(0, 3000).map(lambda end: lambda text: text[:end] + "\n"),
    st.tuples(st.integers(0, 2000), st.integers(0, 500)).map(
        lambda cut: lambda text: text[: cut[0]] + text[sum(cut) :]
    ),
    st.tuples(st.integers(0, 2000), st.text(string.printable + "\x1f", max_size=30)).map(
        lambda put: lambda text: text[: put[0]] + put[1] + text[put[0] :]
    ),
    st.integers(0, 6).map(lambda number: lambda text: "".join(text.splitlines(keepends=True)[:number])),
    st.just(lambda text: ""),
)


@_tmp_is_reused
@given(st.lists(st.sampled_from(_ALIVE), min_size=1, max_size=5), st.lists(_mutilations, min_size=1, max_size=4))
def test_no_answer_makes_a_living_node_count_as_gone(tmp_path, states, answers):
    controller = _Controller()
    cluster_settings = SlurmSettings(state_dir=str(tmp_path))
    directory = ClusterDir(tmp_path, "c")
    controller.home = directory.fingerprint
    controller.states = {str(number): state for number, state in enumerate(states, 1)}
    now = [0.0]
    backend = SlurmJobs(controller, "c", directory.fingerprint, BirthRecords(directory.births))
    cluster = Cluster("c", cluster_settings, {}, backend, clock=lambda: now[0])
    living = {f"{job_id}-tok{int(job_id):03}" for job_id in controller.states}
    assert set(cluster.nodes()) == living
    for mutilate in answers:
        controller.mutilate = mutilate
        now[0] += 10
        try:
            found = cluster.nodes()
        except SlurmError:
            continue
        gone = {node_id for node_id in living if node_id not in found or not found[node_id].seen.alive}
        if gone:
            pytest.fail(f"{gone} count as gone after {mutilate}")
