"""Whatever the document at /openapi.json allows, and much that it forbids, is answered as it describes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.access import new_key
from service.inference import Inference
from tests.service import toy_artifact
from tests.service.conftest import BATCH_SIZES, Launcher, Running

N_EXAMPLES = 50
"""Of each operation, valid and invalid. More find more; each takes some 5 ms."""

TIMEOUT_S = 30
ADMIN_KEY, ADMIN_HASH = new_key()
CHECKS = [
    *(status_code_conformance, content_type_conformance),
    *(response_headers_conformance, response_schema_conformance),
]
OPERATIONS = [
    *("GET /model", "GET /healthz/live", "GET /healthz/ready", "GET /metrics", "POST /predict"),
    *("GET /v2", "GET /v2/health/live", "GET /v2/health/ready", "GET /v2/models/{name}"),
    *("GET /v2/models/{name}/ready", "POST /v2/models/{name}/infer"),
    *("GET /v2/models/{name}/versions/{version}", "GET /v2/models/{name}/versions/{version}/ready"),
    *("POST /v2/models/{name}/versions/{version}/infer", "POST /v2/repository/index"),
    *("POST /v2/repository/models/{name}/load", "POST /v2/repository/models/{name}/unload"),
]


@pytest.fixture(scope="module")
def server(inference: Inference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("repository")
    toy_artifact.write(folder / "toy" / "8", "8")
    with Launcher(inference, ExitStack()) as launch:
        yield launch(
            model_repository=folder, admin_keys=(ADMIN_HASH,), batch_sizes=BATCH_SIZES, profile_seconds=0.01
        )


@pytest.fixture(scope="module")
def operations(server: Running) -> dict[str, Any]:
    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    found: list[Any] = list(schema.get_all_operations())
    return {operation.label: operation for operation in (result.ok() for result in found)}


def test_every_operation_is_tried(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        *((label, GenerationMode.POSITIVE) for label in OPERATIONS),
        *((label, GenerationMode.NEGATIVE) for label in OPERATIONS if label.startswith("POST")),
    ],
)
def test_every_response_is_one_that_the_document_describes(
    server: Running, operations: dict[str, Any], label: str, mode: GenerationMode
) -> None:
    operation = operations[label]

    @seed(0)
    @settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        case: Case[Any] = data.draw(operation.as_strategy(generation_mode=mode))
        if "{name}" in label and data.draw(st.booleans()):
            case.path_parameters = {"name": "toy", **({"version": "7"} if "{version}" in label else {})}
        response = case.call(
            base_url=str(server.client.base_url), headers={"x-api-key": ADMIN_KEY}, timeout=TIMEOUT_S
        )
        checks = CHECKS if response.status_code in {503, 504} else [*CHECKS, not_a_server_error]
        case.validate_response(response, checks=checks)

    ask()
    assert server.client.get("/healthz/live").status_code == 200
