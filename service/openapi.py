"""What /openapi.json says about each operation, and /docs shows. Data only; `api` serves it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import Security, params
from fastapi.security import APIKeyHeader, HTTPBearer

from service import oip
from service.decoding import IMAGE_TYPES
from service.errors import Problem
from service.scheduling import STOPPED_BY
from service.settings import Settings

Schema = dict[str, Any]

_STRING, _NUMBER, _INTEGER, _FLAG = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
_MILLISECONDS = {"type": "number", "description": "[ms]"}


def _object(
    properties: Mapping[str, Schema], *, optional: Iterable[str] = (), is_open: bool = False
) -> Schema:
    """An object with these fields; of others none, unless it is open."""
    required = [name for name in properties if name not in set(optional)]
    closed = {} if is_open else {"additionalProperties": False}
    return {"type": "object", "required": required, "properties": dict(properties), **closed}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


PROBLEM_SCHEMA: Schema = {
    "title": "Problem",
    "description": "RFC 9457 problem details.",
    **_object(
        {
            "type": {"type": "string", "format": "uri"},
            "title": _STRING,
            "status": _INTEGER,
            "detail": {"type": "string", "description": "One sentence: what was wrong and what to do."},
        }
    ),
}
ERROR_SCHEMA = _object({"error": {"type": "string", "description": "What was wrong and what to do."}})

_CLASS = {"label": _STRING, "index": _INTEGER}

PREDICTION_SCHEMA: Schema = {
    "title": "Prediction",
    **_object(
        {
            "model": _STRING,
            "version": _STRING,
            **_CLASS,
            "confidence": {"type": "number", "description": "Probability of `label`."},
            "top": _list(_object({**_CLASS, "probability": _NUMBER})),
            "column": {"type": "string", "description": "The deepest column that contributed."},
            "depth": {"type": "integer", "description": "Its number of layers."},
            "columns_run": _list(_STRING),
            "stopped_by": {
                "enum": list(STOPPED_BY),
                "description": "`budget`: no deeper rung fitted; `confidence`: min_confidence was reached; "
                "`deepest`: nothing more accurate exists; `load`: a deeper rung would have fitted, had "
                "nothing come in between (other requests, a stop, a failed run). In a stream null until it "
                "ends.",
            },
            "budget_ms": _MILLISECONDS,
            "timing_ms": _object(dict.fromkeys(("decode", "queue", "inference"), _MILLISECONDS)),
            "elapsed_ms": {
                "type": "number",
                "description": "From the arrival to the building of this answer [ms].",
            },
            "deadline_met": {
                "type": "boolean",
                "description": "Never true for an answer written after its deadline.",
            },
        }
    ),
}

STATUS_SCHEMA = _object({"status": {"enum": ["live", "ready"]}})
_LATENCY = _object({"median": _MILLISECONDS, "high": _MILLISECONDS})
MODEL_SCHEMA: Schema = {
    "title": "Model",
    **_object(
        {
            "name": _STRING,
            "version": _STRING,
            "created": {"type": "string", "format": "date-time"},
            "sha256": {"type": "string", "description": "Of its manifest, which has those of all its files."},
            "source": {"type": "object", "description": "How it was trained."},
            "labels": _list(_STRING),
            "input": _object(
                {
                    **dict.fromkeys(("height", "width", "channels"), _INTEGER),
                    **dict.fromkeys(("dtype", "layout", "resize"), _STRING),
                }
            ),
            "rungs": _list(
                _object(
                    {
                        "column": _STRING,
                        **dict.fromkeys(("depth", "parameters", "macs"), _INTEGER),
                        "accuracy": {"type": "number", "description": "On held-out pictures."},
                    }
                )
            ),
            "combinations": _list(_object({"columns": _list(_STRING), "accuracy": _NUMBER})),
            "provider": {"enum": ["cpu", "cuda"]},
            "latency_ms": {
                "type": "object",
                "description": "By column and number of pictures in one run.",
                "additionalProperties": {"type": "object", "additionalProperties": _LATENCY},
            },
            "budget_ms": _object(dict.fromkeys(("default", "min", "max", "reserve"), _MILLISECONDS)),
        }
    ),
}

# ---- the Open Inference Protocol ----

_SHAPE = _list(_INTEGER)
_TENSOR = {"name": _STRING, "datatype": _STRING, "shape": _SHAPE}
_PARAMETERS = {"type": "object", "description": "By name."}
OIP_SERVER_SCHEMA = _object({"name": _STRING, "version": _STRING, "extensions": _list(_STRING)})
OIP_LIVE_SCHEMA = _object({"live": _FLAG})
OIP_READY_SCHEMA = _object({"ready": _FLAG})
OIP_MODEL_READY_SCHEMA = _object({"name": _STRING, "ready": _FLAG})
OIP_MODEL_SCHEMA = _object(
    {
        "name": _STRING,
        "versions": _list(_STRING),
        "platform": _STRING,
        "inputs": _list(_object(_TENSOR)),
        "outputs": _list(_object(_TENSOR)),
    }
)
INFER_REQUEST_SCHEMA = _object(
    {
        "id": _STRING,
        "parameters": _object(
            {
                "budget_ms": {"type": "number", "description": "[ms]"},
                "timeout": {
                    "type": "number",
                    "description": "As Triton has it [us]: the budget if there is no other.",
                },
                "min_confidence": {"type": "number", "minimum": 0, "maximum": 1},
                "binary_data_output": _FLAG,
            },
            optional=("budget_ms", "timeout", "min_confidence", "binary_data_output"),
            is_open=True,
        ),
        "inputs": {
            **_list(
                _object(
                    {
                        "name": {"enum": list(oip.INPUTS)},
                        "datatype": {"enum": ["UINT8", "BYTES"]},
                        "shape": _SHAPE,
                        "parameters": _PARAMETERS,
                        "data": {"type": "array", "description": "Of BYTES each file as base64."},
                    },
                    optional=("parameters", "data"),
                    is_open=True,
                )
            ),
            "minItems": 1,
            "maxItems": 1,
        },
        "outputs": _list(
            _object(
                {"name": {"enum": list(oip.OUTPUTS)}, "parameters": _PARAMETERS},
                optional=("parameters",),
                is_open=True,
            )
        ),
    },
    optional=("id", "parameters", "outputs"),
    is_open=True,
)
INFER_RESPONSE_SCHEMA = _object(
    {
        "model_name": _STRING,
        "model_version": _STRING,
        "id": _STRING,
        "parameters": _PARAMETERS,
        "outputs": _list(_object({**_TENSOR, "data": {"type": "array"}}, optional=("data",), is_open=True)),
    },
    optional=("id",),
)
INDEX_REQUEST_SCHEMA = _object({"ready": _FLAG}, optional=("ready",))
INDEX_SCHEMA = _list(
    _object(
        {
            "name": _STRING,
            "version": _STRING,
            "state": {"enum": ["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]},
            "reason": _STRING,
        }
    )
)
DONE_SCHEMA = _object({})


def change_schema(known: Mapping[str, type]) -> Schema:
    """What a request to load or unload may have, by the parameters that it knows."""
    kinds = {str: _STRING, bool: _FLAG}
    parameters = _object({name: kinds[kind] for name, kind in known.items()}, optional=known)
    return _object({"parameters": parameters}, optional=("parameters",))


# ---- operations ----

KEYS: Sequence[params.Depends] = [
    Security(HTTPBearer(auto_error=False, description="A key, if the operator has set any.")),
    Security(APIKeyHeader(name="X-API-Key", auto_error=False, description="The same, for simpler clients.")),
]
"""For the document only: `access` asks for keys, before anything comes here."""

_RETRY = {
    "Retry-After": {"schema": _INTEGER, "description": "[s]"},
    "retry-after-ms": {"schema": _INTEGER, "description": "[ms]"},
}
_HEADERS: Mapping[int, Schema] = {
    401: {"WWW-Authenticate": {"schema": _STRING}},
    405: {"Allow": {"schema": _STRING}},
    429: _RETRY,
    503: {"Retry-After": _RETRY["Retry-After"]},
}

Responses = dict[int | str, dict[str, Any]]


def problems(*kinds: type[Problem]) -> Responses:
    """Responses of these problem types."""
    return _refusals(kinds, "application/problem+json", PROBLEM_SCHEMA)


def errors(*kinds: type[Problem]) -> Responses:
    """Responses of these problem types as the Open Inference Protocol has them."""
    return _refusals(kinds, "application/json", ERROR_SCHEMA)


def _refusals(kinds: Iterable[type[Problem]], media_type: str, schema: Schema) -> Responses:
    found: Responses = {}
    for kind in kinds:
        before = found.get(kind.status)
        found[kind.status] = {
            "description": f"{before['description']}, or {kind.title.lower()}" if before else kind.title,
            "content": {media_type: {"schema": schema}},
            **({"headers": _HEADERS[kind.status]} if kind.status in _HEADERS else {}),
        }
    return found


def answer(description: str, schema: Schema, media_type: str = "application/json") -> Responses:
    """The response where all is well."""
    return {200: {"description": description, "content": {media_type: {"schema": schema}}}}


def prediction() -> Responses:
    """The responses of a prediction."""
    whole = answer("The answer, or rung by rung if a stream was asked for", PREDICTION_SCHEMA)
    event = _object({"event": {"enum": ["prediction", "done"]}, "data": _STRING})
    event["description"] = (
        "Each event; its data is a Prediction, and at the end what was done and why no more."
    )
    documents = {
        "type": "string",
        "description": 'A JSON document a line: a Prediction with `"event": "prediction"`, at the end '
        '`"event": "done"`.',
    }
    whole[200]["content"] |= {
        "text/event-stream": {"schema": event},
        "application/x-ndjson": {"schema": documents},
    }
    return whole


def body(schema: Schema) -> dict[str, Any]:
    """A request's body of JSON, which may be left out."""
    return {"requestBody": {"required": False, "content": {"application/json": {"schema": schema}}}}


def path_parameters(path: str) -> list[Schema]:
    """Those of a path under /v2/models."""
    described = {
        "name": "Of a model.",
        "version": "Of it; `/versions/…` is left out for the one loaded last.",
    }
    return [
        {
            "in": "path",
            "name": name,
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            "description": text,
        }
        for name, text in described.items()
        if f"{{{name}}}" in path
    ]


def predict_operation(settings: Settings) -> dict[str, Any]:
    """Parameters and bodies of /predict, which the endpoint reads by hand."""
    budget = {
        "type": "number",
        "minimum": settings.min_budget_ms,
        "maximum": settings.max_budget_ms,
        "default": settings.default_budget_ms,
    }
    binary = {"type": "string", "format": "binary"}
    return {
        "parameters": [
            _parameter(
                "query", "budget_ms", budget, "Wall time inside the server, arrival to last byte [ms]."
            ),
            _parameter(
                "query", "top_k", {"type": "integer", "minimum": 1, "default": 1}, "Classes in `top`."
            ),
            _parameter(
                "query",
                "min_confidence",
                {"type": "number", "minimum": 0, "maximum": 1},
                "Stop at the first answer at least this confident.",
            ),
            _parameter(
                "query",
                "stream",
                {"enum": ["sse", "ndjson"]},
                "Each rung as it completes; `Accept` can ask for it as well.",
            ),
            _parameter("header", "X-Budget-Ms", budget, "As budget_ms, which wins."),
            _parameter(
                "header", "X-Request-Id", {"type": "string"}, "Returned as it came; made up if missing."
            ),
        ],
        "requestBody": {
            "required": True,
            "content": {
                **{kind: {"schema": binary} for kind in IMAGE_TYPES},
                "multipart/form-data": {
                    "schema": {"type": "object", "required": ["image"], "properties": {"image": binary}}
                },
                "application/octet-stream": {
                    "schema": {
                        **binary,
                        "description": "Exactly height x width x channels uint8, as GET /model says.",
                    }
                },
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["image"],
                        "additionalProperties": False,
                        "properties": {"image": {"type": "string", "contentEncoding": "base64"}},
                    }
                },
            },
        },
    }


def _parameter(place: str, name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"in": place, "name": name, "required": False, "schema": schema, "description": description}
