"""What the SLURM tools print and what sbatch options mean."""

from __future__ import annotations

import itertools

import pytest
from fake.fake_slurm import HEADER
from hypothesis import given
from hypothesis import strategies as st

from ray_slurm_provider.slurm import parse
from ray_slurm_provider.slurm.types import JobState


def _row(job_id="7", state="RUNNING", reason="None", name="n", comment="c"):
    return "\x1f".join([job_id, state, reason, "cpu", "c1", "4:00", "N/A", "N/A", name, comment])


def test_a_row_becomes_a_job():
    (job,) = parse.parse_squeue(f"{HEADER}\n{_row(comment='a|b c')}\n")
    assert (job.job_id, job.state, job.reason, job.nodes, job.start, job.comment) == (
        "7",
        JobState.RUNNING,
        "",
        "c1",
        "",
        "a|b c",
    )


def test_a_job_may_have_no_comment():
    (job,) = parse.parse_squeue(f"{HEADER}\n{_row(comment='(null)')}\n")
    assert job.comment == ""


def test_banners_and_free_text_with_newlines_are_passed_over():
    lines = ["** maintenance on Monday **", HEADER, _row(name="two"), _row("8", comment="one\nand two"), _row("9"), ""]
    text = "\n".join(lines)
    assert [job.job_id for job in parse.parse_squeue(text)] == ["7", "8", "9"]


@pytest.mark.parametrize(
    "text", ["", "\n", "slurm says no\n", HEADER, f"{HEADER}\n{_row()}", f"{HEADER}\n{_row()[:20]}"]
)
def test_what_is_not_a_complete_answer_is_refused(text):
    with pytest.raises(ValueError):
        parse.parse_squeue(text)


_ids = st.from_regex(r"[0-9]{1,7}(_([0-9]{1,4}|\[[0-9]{1,4}([,:%-][0-9]{1,4}){0,4}\]))?", fullmatch=True)
_fields = st.sampled_from([*JobState.__members__, "(null)", "N/A", "None", ""]) | st.text(
    st.characters(exclude_characters="\n\x1f"), max_size=20
)


@given(st.lists(st.tuples(_ids, st.lists(_fields, min_size=8, max_size=8), st.text()), min_size=1))
def test_whatever_a_row_holds_it_is_read(rows):
    body = "".join("\x1f".join([job_id, *fields, comment]) + "\n" for job_id, fields, comment in rows)
    wanted = [job_id for job_id, _, _ in rows]
    found = [job for job in parse.parse_squeue(f"{HEADER}\n{body}") if job.job_id in wanted]
    assert len(found) >= len(rows)
    for job in found:
        assert job.state in JobState
        assert all(element.comment == job.comment for element in itertools.islice(job.elements(), 100))


@given(st.text(st.sampled_from("\x1f\n0123456789_[],-:%+ aN/") | st.characters()))
def test_no_text_below_the_header_makes_the_parser_fail_in_another_way(text):
    try:
        jobs = parse.parse_squeue(f"{HEADER}\n{text}\n")
    except ValueError as error:
        assert "not all named" in str(error)
    else:
        assert all(job.job_id for job in jobs)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.text(), st.text()), max_size=5, unique_by=lambda row: row[0]))
def test_whatever_name_and_comment_hold_every_row_is_found(rows):
    body = "".join(_row(str(number), name=name, comment=comment) + "\n" for number, name, comment in rows)
    found = [job.job_id for job in parse.parse_squeue(f"{HEADER}\n{body}")]
    wanted = [str(number) for number, name, _ in rows if "\n" not in name and "\x1f" not in name]
    # A name with a newline breaks its own row only.
    assert [number for number in found if number in wanted][: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("text", "job_id"), [("42\n", "42"), ("42;cluster\n", "42"), ("Welcome!\n17 users\n\n43;c1\n", "43"), ("44", "44")]
)
def test_the_job_id_is_found_after_banners(text, job_id):
    assert parse.parse_submitted(text) == job_id


def test_no_job_id_is_an_error():
    with pytest.raises(ValueError):
        parse.parse_submitted("Submitted batch job\n")


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("4G", 4096),
        ("512M", 512),
        ("2048", 2048),
        (1024, 1024),
        ("1T", 1048576),
        ("1.5G", 1536),
        ("2048K", 2),
        ("4GB", 4096),
        ("0", 0),
    ],
)
def test_memory_sizes(text, mib):
    assert parse.parse_mem_mib(text) == mib


@pytest.mark.parametrize("text", ["lots", "", "-1", "4 G", "4X", "G"])
def test_what_is_no_memory_size_is_refused(text):
    with pytest.raises(ValueError):
        parse.parse_mem_mib(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("2-12", 216000),
        ("1-02:30", 95400),
        ("1-00:00:30", 86430),
        ("UNLIMITED", None),
    ],
)
def test_time_limits(text, seconds):
    assert parse.parse_time_s(text) == seconds


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("gpu", {"gpu": (1, "")}),
        ("gpu:2", {"gpu": (2, "")}),
        ("gpu:a100", {"gpu": (1, "a100")}),
        ("gpu:a100:4,shard:2", {"gpu": (4, "a100"), "shard": (2, "")}),
        ("gpu:a100:1,gpu:v100:1", {"gpu": (2, "")}),
        ("gres:gpu:3g.20gb:1", {"gpu": (1, "3g.20gb")}),
        ("craynetwork:4K", {"craynetwork": (4096, "")}),
    ],
)
def test_generic_resources(text, wanted):
    assert parse.parse_gres(text) == wanted


@pytest.mark.parametrize("text", ["gpu::", "", ":1", "gpu:a:b:c", "gpu 1"])
def test_what_is_no_generic_resource_is_refused(text):
    with pytest.raises(ValueError):
        parse.parse_gres(text)


def test_the_end_of_a_job():
    end = parse.parse_job_end(
        "JobId=5 JobName=a b=c JobState=FAILED Reason=NonZeroExitCode Dependency=(null) ExitCode=3:0 Comment=x\n"
    )
    assert str(end) == "FAILED, reason NonZeroExitCode, exit code 3"
    assert str(parse.parse_job_end("JobId=5 JobState=CANCELLED Reason=None ExitCode=0:15")) == "CANCELLED, signal 15"


def test_every_state_says_whether_a_job_is_alive():
    alive = {state.label for state in JobState if parse.Job("1", state).alive}
    assert {"PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "UNKNOWN"} <= alive
    assert not {"COMPLETING", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED"} & alive


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("7", ["7"]),
        ("7_3", ["7_3"]),
        ("7_[0-3]", ["7_0", "7_1", "7_2", "7_3"]),
        ("7_[0,2,5-6%4]", ["7_0", "7_2", "7_5", "7_6"]),
        # As squeue prints what is left when every other element was cancelled; its --array forgets the last one.
        ("7_[0-8:2]", ["7_0", "7_2", "7_4", "7_6", "7_8"]),
    ],
)
def test_a_row_stands_for_all_elements_of_an_array_that_wait(text, ids):
    (row,) = parse.parse_squeue(f"{HEADER}\n{_row(text)}\n")
    assert [job.job_id for job in row.elements()] == ids
    assert {job.comment for job in row.elements()} == {"c"}


def test_a_list_of_elements_that_was_cut_is_no_answer():
    with pytest.raises(ValueError, match="not all named"):
        parse.parse_squeue(f"{HEADER}\n{_row('7_[0,2,4,6,')}\n")


@pytest.mark.parametrize(
    ("state", "out"),
    [
        ("IDLE", False),
        ("IDLE+CLOUD+POWERED_DOWN", False),
        ("MIXED+PLANNED", False),
        ("IDLE+DYNAMIC_FUTURE", False),
        ("DOWN*", True),
        ("IDLE+DRAIN", True),
        ("DOWN+DRAIN", True),
        ("IDLE+FAIL", True),
        ("FUTURE", True),
    ],
)
def test_no_job_can_start_on_a_node_that_is_out_of_service(state, out):
    assert bool(parse.OUT_OF_SERVICE.search(state)) == out
