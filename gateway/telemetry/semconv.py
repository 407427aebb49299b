"""The names in spans: OpenTelemetry's if it defines one, else our own under ``gateway.``. They are spelled only here.

OpenTelemetry's semantic conventions are HTTP (stable) and GenAI client embeddings (in development: a name may change, and
then changes here). ``docs/tracing.md`` describes each attribute.
"""

from __future__ import annotations

from typing import Final

# HTTP server spans: https://opentelemetry.io/docs/specs/semconv/http/http-spans/
HTTP_REQUEST_METHOD: Final = "http.request.method"
HTTP_RESPONSE_STATUS_CODE: Final = "http.response.status_code"
HTTP_ROUTE: Final = "http.route"
URL_PATH: Final = "url.path"
URL_SCHEME: Final = "url.scheme"
ERROR_TYPE: Final = "error.type"

# Methods allowed in a span's name and attributes: clients can make up others.
KNOWN_METHODS: Final = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)
OTHER_METHOD: Final = "_OTHER"
OTHER_METHOD_NAME: Final = "HTTP"

# GenAI: https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/client-embeddings.md
GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_ENCODING_FORMATS: Final = "gen_ai.request.encoding_formats"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_EMBEDDINGS_DIMENSION_COUNT: Final = "gen_ai.embeddings.dimension.count"
EMBEDDINGS: Final = "embeddings"
"""The operation, which also begins the span's name: ``embeddings {model}``."""
RERANK: Final = "rerank"
"""The operation of a rerank request; OpenTelemetry defines none for it."""
CLASSIFY: Final = "classify"
"""The operation of a request to classify, likewise."""

# Our own.
GATEWAY_REQUEST_ID: Final = "gateway.request_id"
GATEWAY_ERROR_CODE: Final = "gateway.error_code"
GATEWAY_NUM_TEXTS: Final = "gateway.num_texts"
GATEWAY_NUM_TRUNCATED: Final = "gateway.num_truncated"
GATEWAY_SPACE: Final = "gateway.space"
GATEWAY_TASK: Final = "gateway.task"
GATEWAY_EXPERIMENT: Final = "gateway.experiment"
GATEWAY_ARM: Final = "gateway.arm"
GATEWAY_STAGE_SECONDS: Final = "gateway.stage.seconds"

TOKENIZE: Final = "tokenize"
QUEUE: Final = "queue"
INFERENCE: Final = "inference"
