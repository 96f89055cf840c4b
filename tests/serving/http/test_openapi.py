"""The service keeps the promises of its own OpenAPI document, whatever is asked."""

import pytest

from tests.serving.http.test_app import api, ask

PATHS = ask("GET", "/openapi.json", app=api(token="secret")).json()["paths"]
OPERATIONS = [(method.upper(), path) for path, methods in PATHS.items() for method in methods]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
AUTHORIZED = {"Authorization": "Bearer secret"}
PLAIN_FORMS = {"/v1/score", "/v1/compare", "/v1/best_of"}
"""Their schema says it all. Other trainers' forms hold rendered conversations, which no schema describes."""


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_requests_made_from_the_document_are_answered_as_it_says(method, path):
    """Right ones are taken and wrong ones refused, in documented shapes, with the token only, and never with a 5xx."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (4.32 was tried)")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import CHECKS
    from schemathesis.generation import GenerationMode

    app = api(token="secret", max_request_bytes=200_000)
    checks = {"negative_data_rejection": {"expected-statuses": [400, 413, 422]}}
    config = schemathesis.Config.from_dict({"checks": checks})
    operation = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)[path][method]
    modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if method == "POST" else [])]
    acceptance = CHECKS.get_by_names(["positive_data_acceptance"])
    is_plain = path in PLAIN_FORMS or method == "GET"
    for mode in modes:

        @settings(
            max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def promise(case):
            # `weights` name objectives of the model that is served, which no schema knows.
            all_is_said = is_plain and "weights" not in str(case.body)
            case.call_and_validate(headers=AUTHORIZED, excluded_checks=[] if all_is_said else acceptance)

        promise()


@pytest.mark.parametrize("path", PATHS)
def test_other_methods_are_not_allowed(path):
    app = api(token="secret")
    known = {method.upper() for method in PATHS[path]}
    for method in METHODS:
        if method not in known:
            answer = ask(method, path, app=app, headers=AUTHORIZED)
            assert answer.status_code == 405, method
            assert set(answer.headers["allow"].split(", ")) == known


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "POST"])
def test_a_body_of_another_kind_than_json_is_refused(path, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = ask("POST", path, b'{"prompt": "hi", "responses": ["x"]}', headers=headers)
    assert answer.status_code == 422
    assert answer.json()["detail"]


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if path.startswith("/v1/") or method == "POST"])
def test_the_document_names_the_token_and_every_refusal(path):
    [operation] = PATHS[path].values()
    assert operation["security"] == [{"HTTPBearer": []}, {"HTTPBasic": []}]
    refusals = {"401"} | ({"400", "413", "422", "429", "500", "504"} if "post" in PATHS[path] else set())
    assert operation["responses"].keys() == {"200"} | refusals
    [open_operation] = ask("GET", "/openapi.json").json()["paths"][path].values()
    assert "security" not in open_operation
