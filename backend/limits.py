"""How much is taken on at once: bodies, clicks of one person, work that waits for a thread. What is over is refused.

Nothing here waits without an end: a caller gets an answer, or a refusal that says when to come again.
"""

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from backend.errors import BadRequestError, BusyError, TooLargeError, TooManyClicksError
from backend.schemas import PredictRequest
from backend.settings import Settings

Result = TypeVar("Result")

MAX_KNOWN = 10_000
MAX_IMAGES = 20


def clicker(project: int, task: int | None, drafts: Sequence[Mapping[str, Any]]) -> str:
    """Who clicks, as far as an interactive request tells.

    Label Studio names nobody in it, but of the drafts it sends only those of the person who clicks, each with `user`.
    Before the first draft is saved the task stands for the person: Label Studio hands a task to one person at a time.

    Args:
        project: its id in Label Studio.
        task: the task's id, None where it has none.
        drafts: the task's drafts as they came.
    """
    user = next((str(draft["user"]) for draft in drafts if draft.get("user")), "")
    return f"user {user[:200]}" if user else f"project {project} task {task}"


def check_predict(request: PredictRequest, settings: Settings) -> None:
    """Passes where a request asks for no more than the settings allow.

    Raises:
        TooLargeError: it has more tasks, prompts or label config than that, or more images in the label config, all of
            which is read for each of them.
        BadRequestError: its label config declares entities, which could stand for any of it.
    """
    prompts = len((request.params.context or {}).get("result", ()))
    for given, most, what in (
        (len(request.tasks), settings.max_tasks, "tasks; send fewer at once"),
        (prompts, settings.max_prompts, "prompts; accept or reject the cell and begin anew"),
        (len(request.label_config), settings.max_label_config, "characters of label config; shorten it"),
        (request.label_config.lower().count("<image"), MAX_IMAGES, "images in one label config; drop some"),
    ):
        if given > most:
            raise TooLargeError(f"{given} where {most} are the most: {what}")
    if "<!ENTITY" in request.label_config:
        raise BadRequestError("the label config declares entities; write out what they stand for")


class Bodies:
    """Receives the bodies of requests: so many at once, each up to a size, within a time. Used by one event loop.

    Args:
        max_bytes: a larger body is refused, by its header or when it gets there.
        within_s: one that is not complete by then is refused.
        at_once: so many may be under way.
    """

    def __init__(self, max_bytes: int, *, within_s: float, at_once: int) -> None:
        self._max_bytes = max_bytes
        self._within_s = within_s
        self._at_once = at_once
        self._under_way = 0

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            BusyError: too many are under way.
            TooLargeError: larger than allowed.
            BadRequestError: compressed, too slow, without a proper length, or the caller hung up.
        """
        self._check_headers(request)
        if self._under_way >= self._at_once:
            raise BusyError(f"{self._under_way} bodies are being received; ask again soon")
        self._under_way += 1
        try:
            async with asyncio.timeout(self._within_s):
                return await self._receive(request)
        except TimeoutError as error:
            raise BadRequestError(f"the body was not complete within {self._within_s:g} s; send it at once") from error
        except ClientDisconnect as error:
            raise BadRequestError("the caller hung up before the end of the body") from error
        finally:
            self._under_way -= 1

    def _check_headers(self, request: Request) -> None:
        packed = request.headers.get("content-encoding", "identity")
        if packed.lower() != "identity":
            raise BadRequestError(f"the body is packed ({packed[:40]!r}); send it as it is")
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise BadRequestError(f"content-length {length[:40]!r}; expected the number of bytes")
        if int(length[:20]) > self._max_bytes:
            raise self._too_large()

    async def _receive(self, request: Request) -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is over {self._max_bytes} bytes; send fewer tasks at once")


class ClickRate:
    """A bucket of clicks for each person, filled at a steady rate; safe to use from several threads.

    Args:
        per_s: clicks a second in the long run, > 0.
        burst: how many may come at once, >= 1.
        clock: seconds, never backwards.
    """

    def __init__(self, per_s: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._clock = clock
        self._lock = threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, who: str) -> None:
        """Takes one click out of the bucket of `who`; the person seen longest ago is forgotten first (10 000 are kept).

        Raises:
            TooManyClicksError: it is empty; nothing is taken.
        """
        now = self._clock()
        with self._lock:
            left, seen = self._left.pop(who, (self._burst, now))
            left = min(self._burst, left + (now - seen) * self._per_s)
            self._left[who] = (left - 1.0 if left >= 1.0 else left, now)
            while len(self._left) > MAX_KNOWN:
                self._left.popitem(last=False)
        if left < 1.0:
            raise TooManyClicksError(
                f"more than {self._per_s:g} clicks a second after {self._burst:g} at once; click again in a moment",
                retry_after_s=(1.0 - left) / self._per_s,
            )


class Lane:
    """Threads for one kind of work, and a queue of bounded length before them.

    A call that somebody gave up waiting for keeps its place until it has ended: threads that hang fill the lane, and
    who comes then is refused at once.

    Args:
        name: of its threads.
        threads: so many calls at once, >= 1.
        waiting: so many more may wait, >= 0.
    """

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._name = name
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"celloop-{name}")
        self._places = threading.BoundedSemaphore(threads + waiting)
        self._size = threads + waiting

    async def run(self, call: Callable[[], Result], *, start_s: float, end_s: float) -> Result:
        """What `call` returns or raises.

        Args:
            call: run in one of the threads.
            start_s: it is given up when no thread was free for it by then.
            end_s: nobody waits longer than this for its end.

        Raises:
            BusyError: the lane is full, or one of the two times is over.
        """
        if not self._places.acquire(blocking=False):
            raise BusyError(f"{self._size} requests of this kind ({self._name}) are being answered; ask again soon")
        try:
            held = [call]  # what is given up stays in the pool's queue until a thread is free; not so its request
            job = self._pool.submit(lambda: held.pop()())
        except RuntimeError as error:
            self._places.release()
            raise BusyError("the backend is shutting down; ask again when it is back", retry_after_s=10) from error
        job.add_done_callback(self._left)
        try:
            return await self._wait(job, start_s, end_s)
        finally:
            if job.cancelled():
                held.clear()

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Takes no more calls; as of a ThreadPoolExecutor."""
        self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _left(self, job: Future[Any]) -> None:
        self._places.release()

    async def _wait(self, job: Future[Result], start_s: float, end_s: float) -> Result:
        answer = asyncio.wrap_future(job)
        start_s = min(start_s, end_s)
        done, _ = await asyncio.wait({answer}, timeout=start_s)
        if not done and not job.cancel():
            done, _ = await asyncio.wait({answer}, timeout=end_s - start_s)
        if done and not answer.cancelled():
            return answer.result()
        answer.cancel()
        begun = not job.cancelled()
        waited = f"was not done after {end_s:g} s" if begun else f"found no free thread within {start_s:g} s"
        raise BusyError(f"the request {waited} ({self._name}); ask again", retry_after_s=math.ceil(start_s))
