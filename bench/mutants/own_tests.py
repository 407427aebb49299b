"""Which files of tests are about a module."""

from __future__ import annotations

from pathlib import Path

# They run for minutes, run in separate environments, or do not test code.
NOT_RECORDED = (
    "tests/bulk/stores",
    "tests/clients",
    "tests/cluster/test_on_ray.py",
    "tests/cluster/test_contract_on_replicas.py",
    "tests/cluster/test_rerank_on_replicas.py",
    "tests/cluster/test_tei_on_replicas.py",
    "tests/deploy",
    "tests/loadtest",
    "tests/test_bench",
    "tests/test_imports.py",
)

# The tests of modules whose tests are not in the file or folder named after them.
_OF_THE_SERVICE = ("test_service", "api/test_contract", "api/test_quantized", "api/test_rerank", "api/test_tei")
_TESTS_OF = {
    "gateway/api/endpoint.py": (
        "api/test_bounds",
        "api/test_contract",
        "api/test_errors",
        "api/test_key_requests",
        "api/test_request_log",
        "api/test_tei",
        "batches/test_batch_api",
    ),
    "gateway/api/openai.py": ("api/test_contract", "api/test_lax_bodies", "api/test_pieces", "api/test_quantized"),
    "gateway/api/openai_schema.py": (
        "api/test_contract",
        "api/test_documentation",
        "api/test_lax_bodies",
        "api/test_models_and_health",
    ),
    "gateway/api/token_ids.py": ("api/test_contract", "api/test_lax_bodies", "api/test_bounds"),
    "gateway/api/json_body.py": ("api/test_lax_bodies", "api/test_bounds", "api/test_held_loop", "api/test_contract"),
    "gateway/api/tei_schema.py": ("api/test_tei", "api/test_lax_bodies", "api/test_bounds"),
    "gateway/api/classify.py": ("api/test_classify", "api/test_tei"),
    "gateway/backends/infinity.py": ("backends/test_infinity", "backends/test_unloading", "engine/test_first_run"),
    "gateway/backends/upstream/answers.py": (
        "backends/upstream/test_answers",
        "backends/upstream/test_failures",
        "backends/upstream/test_quirks",
    ),
    "gateway/backends/upstream/failures.py": ("backends/upstream/test_failures", "backends/upstream/test_blame"),
    "gateway/backends/upstream/pool.py": (
        "backends/upstream/test_names",
        "backends/upstream/test_requests",
        "backends/upstream/test_breaker",
    ),
    "gateway/backends/upstream/quirks.py": ("backends/upstream/test_quirks", "backends/upstream/test_learning"),
    "gateway/backends/upstream/watch.py": (
        "backends/upstream/test_names",
        "backends/upstream/test_blame",
        "backends/upstream/test_breaker",
        "backends/upstream/test_quirks",
    ),
    "gateway/backends/watchdog.py": ("backends/test_infinity", "engine/test_working_ahead"),
    "gateway/batches/answering.py": ("batches/test_store_and_runner", "batches/test_batch_api"),
    "gateway/batches/contents.py": ("batches/test_store_and_runner", "batches/test_batch_api", "batches/test_uploads"),
    "gateway/batches/lines.py": ("batches/test_store_and_runner", "batches/test_batch_api"),
    "gateway/batches/recording.py": ("batches/test_store_and_runner", "batches/test_batch_api"),
    "gateway/bulk/manifest.py": ("bulk/test_job", "bulk/test_embed_command"),
    "gateway/cache/entries.py": ("cache/test_stores", "cache/test_files", "cache/test_model_cache"),
    "gateway/engine/admission.py": ("engine/test_admission", "engine/test_low_priority"),
    "gateway/engine/batcher.py": ("engine/test_batcher", "engine/test_admission", "engine/test_low_priority"),
    "gateway/engine/pending.py": ("engine/test_batcher", "engine/test_tokenizer_pool", "engine/test_memory_of_texts"),
    "gateway/engine/checkpoint/classes.py": ("models/test_classes",),
    "gateway/engine/checkpoint/classifier.py": ("models/test_classifiers", "models/test_classes"),
    "gateway/engine/checkpoint/gte_layout.py": ("models/test_gte_layout",),
    "gateway/engine/checkpoint/headers.py": ("models/test_sizes", "models/test_files"),
    "gateway/engine/checkpoint/json_files.py": ("engine/checkpoint/test_read", "models/test_modules"),
    "gateway/engine/checkpoint/layouts.py": (
        "models/test_gte_layout",
        "models/test_nomic_moe",
        "models/test_voyage_layout",
    ),
    "gateway/engine/checkpoint/modules.py": ("models/test_modules", "engine/checkpoint/test_read"),
    "gateway/engine/checkpoint/nomic_layout.py": ("models/test_nomic_moe",),
    "gateway/engine/checkpoint/score_modules.py": ("models/test_score_modules",),
    "gateway/engine/checkpoint/sizes.py": ("models/test_sizes",),
    "gateway/engine/checkpoint/transformer.py": ("models/test_modules", "engine/checkpoint/test_read"),
    "gateway/engine/checkpoint/weights.py": ("engine/checkpoint/test_read", "models/test_sizes", "models/test_files"),
    "gateway/engine/model/runtimes/flash.py": ("models/test_packed", "models/test_on_a_card"),
    "gateway/engine/model/runtimes/low_rank.py": ("models/test_packed", "models/test_on_a_card"),
    "gateway/engine/model/runtimes/network.py": ("models/test_packed", "models/test_on_a_card"),
    "gateway/engine/model/runtimes/packed.py": ("models/test_packed", "models/test_on_a_card"),
    "gateway/engine/model/runtimes/rows.py": ("engine/model/test_rows", "models/test_packed", "models/test_on_a_card"),
    "gateway/engine/model/adapters.py": ("models/test_jina", "models/test_jina_v5_layout"),
    "gateway/engine/model/heads.py": (
        "engine/model/test_heads",
        "models/test_colbert",
        "models/test_m3",
        "models/test_modules",
    ),
    "gateway/engine/model/tokenizer.py": ("engine/model/test_tokenizer", "models/test_late_chunking"),
    "gateway/engine/ahead.py": ("engine/test_working_ahead",),
    "gateway/engine/batch_queue.py": (
        "engine/test_batcher",
        "engine/test_low_priority",
        "engine/test_worker",
        "engine/test_working_ahead",
    ),
    "gateway/engine/checks.py": ("engine/test_checks", "engine/test_worker", "engine/test_batcher"),
    "gateway/engine/worker.py": ("engine/test_worker", "engine/test_batcher", "engine/test_working_ahead"),
    "gateway/experiments/split.py": ("experiments/test_split", "test_observation"),
    "gateway/fleet.py": ("test_fleet", "cache/test_served"),
    "gateway/http/head.py": ("http/test_head", "api/test_connections", "api/test_limits"),
    "gateway/http/middleware.py": (
        "api/test_behind_a_proxy",
        "api/test_contract",
        "api/test_errors",
        "api/test_experiment_requests",
        "api/test_limits",
        "api/test_models_and_health",
        "api/test_priority",
        "api/test_request_log",
        "batches/test_uploads",
        "telemetry/test_tracing",
    ),
    "gateway/http/protocol.py": ("api/test_connections", "api/test_limits", "test_drain"),
    "gateway/requests.py": ("test_requests", "test_service", "api/test_rerank"),
    "gateway/observation.py": ("test_service", "test_observation"),
    "gateway/outcomes/reading.py": ("api/test_outcomes", "outcomes/test_files"),
    "gateway/routing/router.py": (
        "routing/test_router",
        "api/test_experiment_cards",
        "api/test_experiment_requests",
        "api/test_rerank",
        "test_fallbacks",
    ),
    "gateway/routing/names.py": ("routing/test_router", "routing/test_rules", "routing/test_changes"),
    "gateway/service.py": (*_OF_THE_SERVICE, "capture/test_capture"),
    "gateway/computing.py": _OF_THE_SERVICE,
}


def own_tests(project: Path, module: str) -> list[str]:
    """Return the tests of a module: those of its folder that have its name, or else all of its folder's, or its name's."""
    if module in _TESTS_OF:
        return [f"tests/{name}.py" for name in _TESTS_OF[module] if (project / f"tests/{name}.py").is_file()]
    path = Path(module)
    folder = Path("tests", *path.parts[1:-1])
    stem = path.parent.name if path.stem == "__init__" else path.stem
    named = [file for file in all_tests(project) if Path(file).stem.removeprefix("test_").startswith(stem)]
    if same_folder := [file for file in named if Path(file).parent == folder]:
        return same_folder
    of_folder = [file for file in all_tests(project) if Path(file).is_relative_to(folder) and folder.name != "tests"]
    return of_folder or named


def all_tests(project: Path) -> list[str]:
    """Return the files of tests that are recorded."""
    files = sorted(str(path.relative_to(project)) for path in project.glob("tests/**/test_*.py"))
    return [file for file in files if not file.startswith(NOT_RECORDED)]
