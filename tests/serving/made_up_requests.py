"""Made-up requests for every route of the OpenAPI description, against a server in this process: test_schema.py."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from nanochat_pl.common.schema import build
from nanochat_pl.serving.app import create_app
from nanochat_pl.serving.settings import ServeSettings
from tests.serving.test_gate import ScriptedPool

pytest_plugins = ["schemathesis.pytest.plugin"]  # here, and not in every run: pyproject.toml
APP = create_app(ScriptedPool, build(ServeSettings, {"allowed_hosts": ["testserver"]}))
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@pytest.mark.filterwarnings("ignore")
@schema.parametrize()
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_no_request_is_answered_with_a_fault_of_the_server(case):
    if isinstance(case.body, dict) and case.body.get("stream") is True:
        del case.body["stream"]  # a stream is no JSON
    # A conversation must begin with the user, and the like: no schema can say all of it.
    case.call_and_validate(excluded_checks=[schemathesis.checks.CHECKS.get_one("positive_data_acceptance")])
