"""What is kept out: large bodies, strangers, other routes; and what never leaves."""

import httpx

BASIC = httpx.BasicAuth("celloop", "pass-1")


def test_no_secret_and_no_path_of_this_machine_in_a_refusal(backend, recorder):
    server = recorder(lambda request: (404, {}, b""))
    with backend("bright", label_studio_url=server.url, label_studio_token="tok-1") as b:
        reply = b.predict_tasks([{"id": 9, "data": {"image": "/data/upload/3/tok-1.png"}}])
        assert reply.status_code == 502
        assert "/data/upload/3/***.png" in reply.json()["detail"]
        assert "tok-1" not in reply.text
        for name in ("corrupt.png", "missing.png", "../index.sqlite"):
            assert str(b.display.parent) not in b.predict(name).text


def test_a_body_over_the_limit(backend):
    with backend("bright", max_body_bytes=2000) as b:
        assert b.predict("two.png").status_code in (200, 413)
        for body in (b"x" * 2001, (b"x" * 100 for _ in range(21))):
            reply = b.http.post("/predict", content=body)
            assert reply.status_code == 413
            assert reply.json()["error"] == "TooLargeError"
        assert b.http.post("/webhook", content=b"x" * 2001).status_code == 413
        assert b.get("/health").status_code == 200


def test_what_is_not_served(backend):
    with backend() as b:
        for path in ("/", "/docs", "/openapi.json", "/redoc", "/train", "/predict/"):
            assert b.http.get(path, follow_redirects=True).status_code in (404, 405)
        reply = b.get("/nothing")
        assert reply.json()["error"] == "HTTPError"
        assert b.get("/predict").status_code == 405
        assert b.http.post("/health").status_code == 405
        assert b.http.post("/predict", content=b"no json").status_code == 400


def test_password_on_every_route_but_health(backend):
    with backend("bright", user="celloop", password="pass-1") as b:
        assert b.get("/health").status_code == 200
        asks = [
            ("GET", "/versions"),
            ("GET", "/metrics"),
            ("POST", "/setup"),
            ("POST", "/predict"),
            ("POST", "/webhook"),
        ]
        wrong = [
            None,
            "Basic",
            "Basic !!!",
            "Bearer pass-1",
            "Basic " + "Y2VsbG9vcDp4",
            "Basic /w==",
            *(httpx.BasicAuth(user, word)._auth_header for user, word in [("celloop", ""), ("x", "pass-1"), ("", "")]),
        ]
        for method, path in asks:
            for header in wrong:
                reply = b.http.request(method, path, headers={"authorization": header} if header else {})
                assert reply.status_code == 401, (path, header)
                assert reply.headers["www-authenticate"].startswith("Basic")
        assert b.http.get("/versions", auth=BASIC).status_code == 200
        assert b.http.post("/setup", json={"project": "3.1"}, auth=BASIC).status_code == 200
        assert "pass-1" not in b.http.get("/metrics", auth=BASIC).text
