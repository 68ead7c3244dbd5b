import threading
import time

from backend.turns import Turns


def _start(target):
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def test_only_one_at_a_time():
    turns, inside, most = Turns(), 0, 0

    def work():
        nonlocal inside, most
        for click in (False, True, False):
            with turns.take(click=click):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    for thread in [_start(work) for _ in range(8)]:
        thread.join()
    assert most == 1


def test_a_click_goes_before_batches_that_wait_longer(eventually):
    turns, order = Turns(), []
    held, release = threading.Event(), threading.Event()

    def holder():
        with turns.take():
            held.set()
            release.wait(5)

    def waiter(name, click):
        with turns.take(click=click):
            order.append(name)

    threads = [_start(holder)]
    assert held.wait(5)
    threads += [_start(lambda name=f"batch {i}": waiter(name, False)) for i in range(4)]
    time.sleep(0.05)
    threads.append(_start(lambda: waiter("click", True)))
    eventually(lambda: turns._clicks_waiting == 1)
    release.set()
    for thread in threads:
        thread.join()
    assert order[0] == "click"
    assert len(order) == 5


def test_a_click_waits_for_one_image_of_a_batch_not_for_all():
    turns, begun = Turns(), threading.Event()
    done_before_click = 0
    images_done = 0

    def batch():
        nonlocal images_done
        for _ in range(20):
            with turns.take():
                begun.set()
                time.sleep(0.01)
            images_done += 1

    thread = _start(batch)
    assert begun.wait(5)
    with turns.take(click=True):
        done_before_click = images_done
    thread.join()
    assert done_before_click <= 2


def test_an_error_inside_gives_the_turn_back():
    turns = Turns()
    for click in (True, False):
        try:
            with turns.take(click=click):
                raise ValueError
        except ValueError:
            pass
    with turns.take():
        assert turns._clicks_waiting == 0
