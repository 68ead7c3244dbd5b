"""What `celloop review` shows."""

import io

from rich.console import Console

from flows.cli.review import _listed


def shown(**document: object) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(_listed({"images": 30, "cells": 500, "listed": [], "left_out": [], "url": "http://x/1", **document}))
    return console.export_text()


def entry(rank: int) -> dict[str, object]:
    return {"rank": rank, "image_id": f"image{rank}", "score": 0.5, "reason": "1 cell not drawn"}


def test_listed_images_stand_with_their_reason() -> None:
    text = shown(listed=[entry(1), entry(2)], left_out=["i9: the file is gone"])
    for part in ("2 of 30 labelled images", "image1", "0.50", "1 cell not drawn", "http://x/1", "i9: the file is gone"):
        assert part in text


def test_a_long_list_is_cut_and_an_empty_one_says_so() -> None:
    text = shown(listed=[entry(k) for k in range(1, 31)])
    assert "10 more, and all" in text
    assert "image21" not in text
    assert "nothing suspicious in 30 labelled images" in shown()
