"""How long the stages took: what the log says, no second counted twice."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histossl.execution.journal import Journal
from histossl.study.folder import COLUMNS, Study
from histossl.study.times import stage_times, timed


def line(stage: str, begin: float, end: float) -> str:
    about = {"time": datetime.fromtimestamp(end, UTC).isoformat(timespec="seconds"), "stage": stage}
    return json.dumps(about | {"seconds": end - begin}) + "\n"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 15)), max_size=12))
def test_a_second_in_which_several_slides_were_done_counts_once(tmp_path_factory, told):
    study = Study(tmp_path_factory.mktemp("times"))
    stretches = [(stage, 4 * begin, 4 * (begin + length)) for stage, begin, length in told]  # none nearer than 4 s
    study.log.write_text("".join(line(*one) for one in stretches) + '{"kept": true}\n{"time": "20')
    busy = {stage: set() for stage, _, _ in stretches}
    for stage, begin, end in stretches:
        busy[stage] |= set(range(begin, end))
    assert stage_times(study) == pytest.approx({stage: len(seconds) for stage, seconds in busy.items()})


def test_the_clock_of_the_log_is_coarse_and_nothing_is_lost_between_two_slides(tmp_path):
    study = Study(tmp_path)
    study.log.write_text(line("encode", 0, 10) + line("encode", 10.6, 20))  # told as 10.6 s that end at 10 and at 20
    assert stage_times(study)["encode"] == pytest.approx(20, abs=1)


def test_a_stage_writes_its_time_and_one_that_fails_does_not(tmp_path):
    study = Study(tmp_path)
    study.write_slides([dict.fromkeys(COLUMNS, "") | {"slide_id": "a", "path": "a"}])

    @timed("rest")
    def rest(study: Study, seconds: float) -> str:
        time.sleep(seconds)
        return "rested"

    with pytest.raises(ValueError, match="negative"):
        rest(study, -1)
    assert stage_times(study) == {}
    assert rest(study, 0.2) == "rested"
    assert 0.2 <= stage_times(study)["rest"] < 60
    ledger = Journal(study)  # lines that are of no slide change nothing
    assert [row["slide_id"] for row in ledger.rows] == ["a"]
    assert ledger.news() == []
