from pathlib import Path

from begun import LAYOUTS
from launch import launch


def test_each_weight_is_decomposed_once_for_the_job_and_its_factors_sent_once(bases: Path) -> None:
    (bases / "begun").mkdir()
    verdicts = launch("begun.py", ranks=2, folder=bases / "begun", checks=list(LAYOUTS))
    assert {name: verdict["error"] for name, verdict in verdicts.items()} == dict.fromkeys(LAYOUTS, "")
    figures = {name: verdict["figures"] for name, verdict in verdicts.items()}
    assert figures["FSDP2"] == figures["TP2"] and figures["PP2"]["sent"] == 0
