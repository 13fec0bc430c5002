"""The timeline of a request: a PNG that shows what the metrics say, and nothing drawn for what has no times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.toy_engine import PictureParams, TextParams, toy_config
from support.toy_sound import speech_config

from vllm_omni import Omni, OmniOutput, RequestStatus
from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.plots.timeline_plot import FIRST, WAITED, WORKED, draw_timeline, timeline_figure

SPEECH: dict[str, dict[str, Any]] = {
    "thinker": {"queued_s": 0.0, "started_s": 0.0, "ran_s": 1.5, "first_rows_s": 0.125},
    "talker": {"queued_s": 0.0, "started_s": 0.25, "ran_s": 3.0, "first_rows_s": 0.5},
    "token2wav": {"queued_s": 0.5, "started_s": 1.5, "ran_s": 2.5},
    "image": {"skipped": True, "reason": "thinker.scene: when 'scene' is false"},
}


def colour_of(patch: Any) -> str:
    from matplotlib.colors import to_hex

    return str(to_hex(patch.get_facecolor()))


def bars(figure: Any, colour: str) -> list[tuple[float, float, int]]:
    """(left, width, row) of the bars of one colour."""
    found = [patch for patch in figure.axes[0].patches if colour_of(patch) == colour]
    return [(bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in found]


def test_every_stage_has_a_named_row_with_its_wait_and_its_work() -> None:
    figure = timeline_figure(SPEECH)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SPEECH)
    assert bars(figure, WORKED) == [(0.0, 1.5, 0), (0.25, 3.0, 1), (1.5, 2.5, 2)]
    assert bars(figure, WAITED) == [(0.0, 0.0, 0), (0.25, 0.0, 1), (1.0, 0.5, 2)]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert axes.get_xlabel().endswith("(s)") and axes.get_xlim()[1] > 4.0


def test_a_mark_stands_where_the_first_rows_came() -> None:
    marks = [line for line in timeline_figure(SPEECH).axes[0].lines if line.get_color() == FIRST]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(0.125, 0), (0.75, 1)]


def test_words_say_how_long_and_who_was_skipped() -> None:
    said = [text.get_text() for text in timeline_figure(SPEECH).axes[0].texts]
    assert said == ["1.50 s, first rows after 125 ms", "3.00 s, first rows after 500 ms", "2.50 s", "skipped"]


def test_the_legend_names_first_rows_only_where_there_are_some() -> None:
    def legend(metrics: dict[str, dict[str, Any]]) -> list[str]:
        return [text.get_text() for text in timeline_figure(metrics).legends[0].get_texts()]

    assert legend(SPEECH) == ["queued", "ran", "first rows"]
    assert legend({"token2wav": SPEECH["token2wav"]}) == ["queued", "ran"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [["token2wav"], list(SPEECH), [f"a_stage_with_a_long_name_{n}" for n in range(12)]])
def test_the_picture_grows_with_the_stages_and_names_stay_inside(tmp_path: Path, names: list[str]) -> None:
    metrics = dict.fromkeys(names, SPEECH["talker"])
    draw_timeline(metrics, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and image.width == 900 and image.height == round(160 + 45 * len(names))
        assert image.convert("L").crop((0, 0, 3, image.height)).getextrema() == (255, 255)  # no name is cut


@pytest.mark.filterwarnings("error")
def test_work_of_no_time_at_all_can_be_drawn(tmp_path: Path) -> None:
    moment = {"queued_s": 0.0, "started_s": 0.0, "ran_s": 0.0}
    draw_timeline({"text": moment}, tmp_path / "x.png")
    assert bars(timeline_figure({"text": moment}), WORKED)[0][1] > 0
    draw_timeline({"text": {"skipped": True, "reason": "so"}}, tmp_path / "y.png")
    assert (tmp_path / "y.png").stat().st_size > 1000


def test_an_output_draws_its_own_stages(tmp_path: Path) -> None:
    with Omni(speech_config()) as omni:
        *parts, final = omni.stream("a", TextParams(steps=4))
    final.plot_timeline(tmp_path / "speech.PNG")
    with Image.open(tmp_path / "speech.PNG") as image:
        assert image.size == (900, 250)
    assert [label.get_text() for label in timeline_figure(final.metrics).axes[0].get_yticklabels()] == ["text", "voice"]
    with pytest.raises(InvalidRequestError, match="running"):
        parts[0].plot_timeline(tmp_path / "x.png")


def test_a_failed_request_draws_what_it_did_and_a_rejected_one_nothing(tmp_path: Path) -> None:
    with Omni(toy_config()) as omni:
        failed = omni.generate("a", PictureParams(do="fail"))[0]
        rejected = omni.generate("a", PictureParams(do="reject"))[0]
    failed.plot_timeline(tmp_path / "failed.png")
    assert (tmp_path / "failed.png").is_file() and list(failed.metrics) == ["encode"]
    with pytest.raises(InvalidRequestError, match="rejected"):
        rejected.plot_timeline(tmp_path / "rejected.png")


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    output = OmniOutput(request_id="r", status=RequestStatus.FINISHED, metrics=SPEECH)
    with pytest.raises(InvalidRequestError, match=r"expected a name that ends in \.png"):
        output.plot_timeline(tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from vllm_omni.utils.plots.timeline_plot import draw_timeline\n"
        f"draw_timeline({{'text': {SPEECH['thinker']!r}}}, Path({str(tmp_path / 'x.png')!r}))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == 0
    assert (tmp_path / "x.png").is_file()
