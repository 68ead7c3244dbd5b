"""A server that gives fewer tasks at once than it is asked for, as one with TASK_API_PAGE_SIZE_MAX does."""

from typing import Any

import pytest

from loop.adapters.label_studio_queue import queued_tasks


class Pages:
    """Gives `most` of its tasks a page."""

    def __init__(self, n: int, most: int) -> None:
        self.tasks = [
            {"id": i, "predictions_score": i / 9, "total_annotations": 0, "cancelled_annotations": 0}
            | {"total_predictions": 1}
            for i in range(1, n + 1)
        ]
        self.most = most
        self.asked: list[int] = []

    def get(self, path: str, *, page: int, page_size: int, **_: Any) -> dict[str, Any]:
        size = min(page_size, self.most)
        self.asked.append(page)
        return {"tasks": self.tasks[(page - 1) * size : page * size], "total": len(self.tasks)}


@pytest.mark.parametrize(("n", "most", "pages"), [(5, 100, [1]), (5, 2, [1, 2, 3]), (4, 2, [1, 2]), (0, 2, [1])])
def test_all_that_was_asked_for_comes(n: int, most: int, pages: list[int]) -> None:
    server: Any = Pages(n, most)
    assert list(queued_tasks(server, 1, list(range(1, 6)))) == list(range(1, n + 1))
    assert server.asked == pages
