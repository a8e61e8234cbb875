"""What /docs says about each operation. Data only; `api` serves it."""

from typing import Any

from service.decoding import IMAGE_TYPES
from service.errors import Problem
from service.scheduling import STOPPED_BY
from service.settings import Settings

PROBLEM_SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457 problem details.",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence: what was wrong and what to do."},
    },
}

_CLASS = {"label": {"type": "string"}, "index": {"type": "integer"}}
_MILLISECONDS = {"type": "number", "description": "[ms]"}

PREDICTION_SCHEMA: dict[str, Any] = {
    "title": "Prediction",
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "version": {"type": "string"},
        **_CLASS,
        "confidence": {"type": "number", "description": "Probability of `label`."},
        "top": {
            "type": "array",
            "items": {"type": "object", "properties": {**_CLASS, "probability": {"type": "number"}}},
        },
        "column": {"type": "string", "description": "The deepest column that contributed."},
        "depth": {"type": "integer", "description": "Its number of layers."},
        "columns_run": {"type": "array", "items": {"type": "string"}},
        "stopped_by": {
            "enum": list(STOPPED_BY),
            "description": "`budget`: no deeper rung fitted; `confidence`: min_confidence was reached; "
            "`deepest`: nothing more accurate exists; `load`: a deeper rung would have fitted, had nothing "
            "come in between (other requests, a stop, a failed run).",
        },
        "budget_ms": _MILLISECONDS,
        "elapsed_ms": {
            "type": "number",
            "description": "From the arrival to the building of this answer [ms].",
        },
        "deadline_met": {
            "type": "boolean",
            "description": "Never true for an answer written after its deadline.",
        },
        "timing_ms": {
            "type": "object",
            "properties": {"decode": _MILLISECONDS, "queue": _MILLISECONDS, "inference": _MILLISECONDS},
        },
    },
}


def problems(*kinds: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """Responses of these problem types."""
    return {
        kind.status: {
            "description": kind.title,
            "content": {"application/problem+json": {"schema": PROBLEM_SCHEMA}},
        }
        for kind in kinds
    }


def prediction() -> dict[int | str, dict[str, Any]]:
    """The response of a prediction."""
    return {
        200: {"description": "The answer", "content": {"application/json": {"schema": PREDICTION_SCHEMA}}}
    }


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
