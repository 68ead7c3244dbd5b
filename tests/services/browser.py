"""A person at Label Studio's pages, in headless Chromium: log in, open the queue, click, accept, submit."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from playwright.sync_api import Page, Request, sync_playwright

from flows.local.workspace import Endpoints

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
WAIT_MS = 30_000
TINT = 10
"""How much more green than red and blue a pixel of a grey picture is where a cell is drawn over it."""

EDITOR = "window.Htx.annotationStore.selected"


def find_chromium() -> str:
    """The browser's program; where there is none the test is left out and says what to install, and in CI it fails."""
    named = os.environ.get("CELLOOP_CHROMIUM")
    for program in (named,) if named else PROGRAMS:
        found = shutil.which(program)
        if found:
            return found
    text = (
        f"the browser test needs Chromium, and there is no {named or ' or '.join(PROGRAMS)}; install it "
        "(apt install chromium) or name its program in CELLOOP_CHROMIUM"
    )
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


class Person:
    """Somebody who labels: what they do on the pages and what they see there.

    Places are percent of the image, as Label Studio counts them.
    """

    def __init__(self, page: Page, endpoints: Endpoints) -> None:
        self.page = page
        self.strange_hosts: set[str] = set()
        self._endpoints = endpoints
        self._answer: list[dict[str, Any]] = []
        page.set_default_timeout(WAIT_MS)
        page.on("request", self._note)

    def log_in(self) -> None:
        self.page.goto(f"{self._endpoints.label_studio_url}/user/login/")
        self.page.fill("input[name=email]", self._endpoints.label_studio_email)
        self.page.fill("input[name=password]", self._endpoints.label_studio_password)
        self.page.click("button[type=submit]")
        self.page.get_by_text("Recent Projects").wait_for()

    def open_project(self, project_id: int) -> None:
        self.page.goto(f"{self._endpoints.label_studio_url}/projects/{project_id}/data")

    def label_all_tasks(self) -> None:
        """The button above the list of tasks; returns when the first task of the queue is open with its outlines."""
        self.page.get_by_text("Label All Tasks").click()
        self.page.wait_for_function(f"() => window.Htx && window.Htx.annotationStore && {EDITOR}?.regions.length > 0")

    def task_id(self) -> int:
        return int(self.page.evaluate("window.Htx.task.id"))

    def zoom_out(self) -> None:
        """The whole image into view: Label Studio may open it a little larger than its frame."""
        self.page.locator('[aria-label="zoom-out"]').click()

    def regions(self) -> list[dict[str, Any]]:
        """The regions as they would be submitted now."""
        regions: list[dict[str, Any]] = json.loads(
            self.page.evaluate(f"JSON.stringify({EDITOR}.serializeAnnotation())")
        )
        return regions

    def suggestions(self) -> list[str]:
        """The kinds of the regions that a click suggests and nobody has accepted yet."""
        kinds: list[str] = self.page.evaluate(f"[...{EDITOR}.suggestions.values()].map(region => region.type)")
        return kinds

    def tinted(self) -> npt.NDArray[np.bool_]:
        """(h, w) bool: where the picture on screen, whose image is grey, is coloured."""
        shot = self.page.screenshot(clip=self._frame())
        pixels = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        blue, green, red = (channel.astype(int) for channel in cv2.split(pixels))
        tinted: npt.NDArray[np.bool_] = green - np.maximum(blue, red) > TINT
        return tinted

    def colour(self, x: float, y: float) -> tuple[int, int, int]:
        """Blue, green and red (0..255) of the picture on screen at a place."""
        shot = self.page.screenshot(clip=self._frame())
        pixels = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        blue, green, red = pixels[int(y / 100 * pixels.shape[0]), int(x / 100 * pixels.shape[1])].tolist()
        return blue, green, red

    def click(self, x: float, y: float) -> None:
        frame = self._frame()
        self.page.mouse.click(frame["x"] + x / 100 * frame["width"], frame["y"] + y / 100 * frame["height"])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses the button at one place, moves to the other in steps, lets go."""
        frame = self._frame()
        (x0, y0), (x1, y1) = (
            (frame["x"] + x / 100 * frame["width"], frame["y"] + y / 100 * frame["height"]) for x, y in (start, end)
        )
        self.page.mouse.move(x0, y0)
        self.page.mouse.down()
        self.page.mouse.move(x1, y1, steps=8)
        self.page.mouse.up()

    def delete_region(self, x: float, y: float) -> None:
        """Selects the region there by a click and removes it by a key."""
        before = len(self.regions())
        self.click(x, y)
        self.page.wait_for_function(f"() => {EDITOR}.selectedRegions?.length === 1")
        self.page.keyboard.press("Backspace")
        self.page.wait_for_function(f"n => {EDITOR}.regions.length === n - 1", arg=before)

    def switch_on(self) -> None:
        """Switches Auto-Annotation on, without which no smart tool is offered."""
        self.page.get_by_text("Auto-Annotation").click()
        self.page.locator(".lsf-toolbar .lsf-tool_smart").first.wait_for()

    def take_tool(self, name: str) -> None:
        """Takes a smart tool, "key-point-tool" or "rectangle-tool", from the menu at the toolbar's end."""
        self.page.locator(".lsf-toolbar .lsf-tool_smart").first.hover()
        self.page.locator(f'.lsf-toolbar .lsf-tool_smart[aria-label="{name}"]').click()

    def choose_label(self, place: int) -> None:
        """The label at this place of the row above the image, from 0."""
        self.page.locator(".lsf-label").nth(place).click()

    def click_for_cell(self, label: int, x: float, y: float, *, negative: bool = False) -> None:
        """A label and a click with the smart point tool, with Alt where it says "not this"; waits for the answer."""

        def press() -> None:
            self.choose_label(label)
            if negative:
                self.page.keyboard.down("Alt")
            self.click(x, y)
            if negative:
                self.page.keyboard.up("Alt")

        self._ask(press)

    def drag_for_cell(self, label: int, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A label and a box with the smart rectangle tool; waits for the answer."""

        def press() -> None:
            self.choose_label(label)
            self.drag(start, end)

        self._ask(press)

    def suggested(self) -> list[dict[str, Any]]:
        """What the model answered last, as regions."""
        return self._answer

    def accept(self) -> None:
        self.page.get_by_test_id("bottombar-accept-suggestions-button").click()
        self.page.wait_for_function(f"() => {EDITOR}.suggestions.size === 0")

    def submit(self) -> int:
        """Submits the task; returns the annotation's number when the next task is on the page."""
        before = self.task_id()
        with self.page.expect_response(
            lambda answer: answer.request.method == "POST" and f"/tasks/{before}/annotations" in answer.url
        ) as reply:
            self.page.get_by_test_id("bottombar-submit-button").click()
        assert reply.value.status == 201
        self.page.wait_for_function(
            f"id => window.Htx && window.Htx.task?.id !== id && {EDITOR}?.regions.length > 0", arg=before
        )
        return int(reply.value.json()["id"])

    def until(self, check: Callable[[], bool], what: str) -> None:
        """Waits for what the page draws in its own time."""
        deadline = time.monotonic() + WAIT_MS / 1000
        while not check():
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {WAIT_MS / 1000:.0f} s")
            time.sleep(0.2)

    def _ask(self, press: Callable[[], None]) -> None:
        """Asks the model, and waits until its answer has replaced the one before."""
        keys = f"[...{EDITOR}.suggestions.keys()]"
        before = self.page.evaluate(keys)
        with self.page.expect_response(lambda answer: "/interactive-annotating" in answer.url) as reply:
            press()
        assert reply.value.status == 200
        self._answer = reply.value.json()["data"]["result"]
        self.page.wait_for_function(
            f"([before, n]) => {keys}.length === n && !{keys}.some(key => before.includes(key))",
            arg=[before, len(self._answer)],
        )

    def _frame(self) -> Any:
        """Where the image lies on the page; asked anew each time because the page scrolls."""
        frame = self.page.locator("canvas").first.bounding_box()
        assert frame is not None
        return frame

    def _note(self, request: Request) -> None:
        if not request.url.startswith((self._endpoints.label_studio_url, "data:", "blob:")):
            self.strange_hosts.add(request.url)


@contextmanager
def sitting_person(chromium: str, endpoints: Endpoints, folder: Path) -> Iterator[Person]:
    """A person before a fresh browser; what was on the screen at a failure is kept in `folder`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=list(ARGUMENTS))
        try:
            person = Person(browser.new_page(viewport={"width": 1400, "height": 900}), endpoints)
            try:
                yield person
            except BaseException as error:
                person.page.screenshot(path=folder / "page.png")
                error.add_note(f"the page as it was then: {folder / 'page.png'}")
                raise
        finally:
            browser.close()
