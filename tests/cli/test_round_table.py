"""What `celloop round` shows of pseudo-labels."""

import io

from rich.console import Console

from flows.cli.projects import _round


def test_pseudo_labels_are_told_in_words() -> None:
    pseudo = {
        "reason": "on: 80 sure cells teach",
        "mixed_ap": 0.6123,
        "labelled_ap": 0.5,
        "audits": {"sam": {"reason": "switched off by the audit"}},
        "missing": {"yolo": "install ultralytics"},
        "reliability": [[0.1, 0.2, 30]],
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(_round({"number": 3, "pseudo": pseudo}))
    text = console.export_text()
    for part in ("on: 80 sure cells", "AP 0.612 with them, 0.500 without", "sam: switched off", "yolo is left out"):
        assert part in text
    assert "30" not in text
    console.print(_round({"number": 3, "pseudo": {**pseudo, "labelled_share": 0.5}}))
    assert "0.500 without (which had 50% of the training)" in console.export_text()


def test_a_round_without_a_model_says_so() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(_round({"pseudo": {"on": False, "reason": "off: this round trained no model"}}))
    assert "off: this round trained no model" in console.export_text()
