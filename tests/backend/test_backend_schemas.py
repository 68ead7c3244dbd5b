import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import BadRequestError
from backend.schemas import PredictRequest, SetupRequest, WebhookEvent, label_studio_id, parse, prediction_item
from loop.errors import NonFiniteError, StateError


@given(st.integers(0, 10**17), st.integers(0, 2**40))
def test_project_id_is_what_stands_before_the_dot(number, created):
    assert label_studio_id(f"{number}.{created}") == number
    assert label_studio_id(str(number)) == number
    assert label_studio_id(number) == number


@pytest.mark.parametrize("value", ["", ".5", "x.1", "-3.1", None, True, "1 2", "²", "9" * 40])
def test_other_project_ids_are_refused(value):
    with pytest.raises(ValueError, match="expected"):
        label_studio_id(value)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [({"a": 1}, {"a": 1}), ('{"a": 1}', {"a": 1}), (None, {}), ("", {}), ({}, {})],
)
def test_extra_params_come_as_an_object_or_as_a_string(extra, expected):
    body = {"project": "3.1700000000", "schema": "<View/>", "hostname": "", "access_token": "t", "extra_params": extra}
    assert parse(SetupRequest, orjson.dumps(body)).extra_params == expected


@pytest.mark.parametrize("extra", ["no json", "[1]", 5])
def test_other_extra_params_are_refused(extra):
    with pytest.raises(BadRequestError, match="extra_params"):
        parse(SetupRequest, orjson.dumps({"project": "3.1", "extra_params": extra}))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff"])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(BadRequestError):
        parse(WebhookEvent, body)


def test_a_refusal_repeats_no_value():
    with pytest.raises(BadRequestError) as caught:
        parse(SetupRequest, orjson.dumps({"project": "secret-token-value"}))
    assert "secret-token-value" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"tasks": []}, {"tasks": [{"id": 1}]}, {"tasks": [{"id": "x", "data": {}}]}, {"tasks": [5]}, {"params": 5}],
)
def test_a_predict_request_without_usable_tasks_is_refused(change):
    body = {"tasks": [{"id": 1, "data": {"image": "/a.png"}}], "project": "3.1", "label_config": "<View/>"}
    with pytest.raises(BadRequestError):
        parse(PredictRequest, orjson.dumps(body | change))


def test_context_none_means_batch():
    task = {"id": 1, "data": {"image": "/a.png"}, "annotations": [{"result": []}], "meta": {}}
    body = {"tasks": [task], "project": "3.1", "params": {"login": None, "password": None, "context": None}}
    assert parse(PredictRequest, orjson.dumps(body)).params.context is None
    assert parse(PredictRequest, orjson.dumps(body | {"params": None})).params.context is None


def test_a_good_prediction_passes_unchanged():
    region = {"id": "a", "value": {"points": [[0.0, 1.5], [2, 3]], "polygonlabels": ["Cell"]}}
    for more in ({}, {"parentID": None}, {"value": {"text": "null"}}):
        expected = {"result": [region | more], "score": 0.25, "model_version": "v1"}
        assert orjson.loads(orjson.dumps(prediction_item([region | more], 0.25, "v1"))) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_infinite_leaves(bad):
    with pytest.raises(NonFiniteError, match="v1"):
        prediction_item([], bad, "v1")
    with pytest.raises(NonFiniteError, match="v1"):
        prediction_item([{"value": {"points": [[0.0, bad]]}}], 0.5, "v1")


def test_no_region_that_is_no_object_and_no_empty_version():
    with pytest.raises(StateError, match="list"):
        prediction_item([[1, 2]], 0.5, "v1")
    with pytest.raises(StateError, match="version"):
        prediction_item([], 0.5, "")
