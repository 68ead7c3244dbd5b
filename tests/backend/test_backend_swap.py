"""Models change while people and Label Studio ask: nothing fails, and no reply mixes two models."""

import threading

import httpx


def test_swaps_under_load_fail_no_request_and_mix_no_versions(backend, eventually):
    with backend("bright") as b:
        tasks = [b.task("two.png", i) for i in range(3)]
        body = b.body(tasks)
        stop = threading.Event()
        replies, faults = [], []

        def ask():
            with httpx.Client(base_url=str(b.http.base_url), trust_env=False, timeout=60) as http:
                while not stop.is_set():
                    try:
                        reply = http.post("/predict", json=body)
                        replies.append(reply.json() if reply.status_code == 200 else faults.append(reply.text))
                    except httpx.HTTPError as error:
                        faults.append(repr(error))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(replies) > 8, within_s=30)
        for kind in ("dark", "bright"):
            seen = len(replies)
            label = b.registry.promote(kind, download_s=0.05)
            eventually(lambda label=label: b.parts.slot.get("cells").label == label, within_s=20)
            eventually(lambda seen=seen: len(replies) > seen + 8, within_s=30)
        stop.set()
        for thread in threads:
            thread.join()
        assert faults == []
        assert b.metric("celloop_model_swaps_total", project="cells") == 3
    versions = set()
    for reply in replies:
        answered = {prediction["model_version"] for prediction in reply["results"]}
        assert len(answered) == 1
        version = answered.pop()
        versions.add(version)
        bright = int(version.rpartition("-v")[2]) % 2 == 1
        numbers = [len(prediction["result"]) for prediction in reply["results"]]
        assert numbers == ([3, 3, 3] if bright else [1, 1, 1]), version
    assert versions == {f"celloop-cells-v{n}" for n in range(1, 4)}


def test_a_request_that_is_being_answered_keeps_its_model(backend, eventually):
    with backend("slow") as b:
        tasks = [b.task("two.png", i) for i in range(10)]
        reply = []
        thread = threading.Thread(target=lambda: reply.append(b.predict_tasks(tasks).json()))
        thread.start()
        label = b.registry.promote("dark")
        eventually(lambda: b.parts.slot.get("cells").label == label)
        assert thread.is_alive()
        assert b.setup().json() == {"model_version": label}
        thread.join()
        assert {one["model_version"] for one in reply[0]["results"]} == {"celloop-cells-v1"}
        assert [len(one["result"]) for one in reply[0]["results"]] == [3] * 10
