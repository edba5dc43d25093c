"""The API's description (OpenAPI 3.1), made of what endpoints.py declares."""

from __future__ import annotations

from typing import Any

import coca_jax
from coca_jax.serving.endpoints import ENDPOINTS, SIDES, Endpoint


def document(locked: bool) -> dict[str, Any]:
    """locked: whether requests need the server's key."""
    paths: dict[str, Any] = {one.path: dict(post=_operation(one)) for one in ENDPOINTS}
    paths["/api/info"] = dict(get=_read("What the model is and can do, and the limits."))
    side = dict(type="integer", enum=list(SIDES), default=SIDES[0])
    picture = _read("A picture of the index, smaller, as JPEG.", "image/jpeg")
    picture["parameters"] = [
        {"name": "row", "in": "path", "required": True, "schema": dict(type="integer", minimum=0)},
        {"name": "side", "in": "query", "schema": side},
    ]
    paths["/api/pictures/{row}"] = dict(get=picture)
    paths["/healthz"] = dict(get=_read("200: it answers; 503: the thread of the model has ended."))
    paths["/metrics"] = dict(get=_read("Counters for Prometheus.", "text/plain"))
    found: dict[str, Any] = dict(
        openapi="3.1.0",
        info=dict(
            title="coca_jax",
            version=coca_jax.__version__,
            description="A contrastive captioner: captions, labels, questions, embeddings, search.",
        ),
        paths=paths,
        components=dict(schemas=dict(Error=_ERROR)),
    )
    if locked:
        found["components"]["securitySchemes"] = dict(key=dict(type="http", scheme="bearer"))
        found["security"] = [dict(key=[])]
    return found


_ERROR = dict(
    type="object",
    required=["error"],
    properties=dict(error=dict(type="string", description="What is wrong, in one sentence.")),
)
_REFUSALS = {
    "400": "A field or picture that cannot be.",
    "404": "Nothing of that kind here.",
    "408": "Not sent in time.",
    "413": "Too large.",
    "503": "Too many wait, or it is stopping.",
}


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": dict(schema={"$ref": "#/components/schemas/Error"})}
    refused = {k: dict(description=text, content=error) for k, text in _REFUSALS.items()}
    return {"200": dict(description="The answer.", content=content)} | refused


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    schema: dict[str, Any] = dict(
        type="object",
        properties={field.name: field.schema() for field in endpoint.fields},
        additionalProperties=False,
    )
    required = [field.name for field in endpoint.fields if field.required]
    if required:
        schema["required"] = required
    answer: dict[str, Any] = {
        "application/json": dict(schema=dict(type="object"), example=endpoint.example)
    }
    if any(field.name == "stream" for field in endpoint.fields):
        answer["text/event-stream"] = dict(schema=dict(type="string"))
    return dict(
        operationId=endpoint.path.rsplit("/", 1)[1],
        summary=endpoint.about,
        requestBody=dict(required=True, content={"multipart/form-data": dict(schema=schema)}),
        responses=_responses(answer),
    )


def _read(about: str, content: str = "application/json") -> dict[str, Any]:
    return dict(summary=about, responses=_responses({content: {}}))
