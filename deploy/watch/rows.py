"""The rows of the dashboard, from the top."""

from __future__ import annotations

from typing import Final

from deploy.watch.rows_models import BATCHES, CLUSTER, JOBS, MACHINE, MODELS
from deploy.watch.rows_traffic import ERRORS, EXPERIMENTS, OVERVIEW, UPSTREAM

ROWS: Final = (OVERVIEW, MODELS, BATCHES, EXPERIMENTS, ERRORS, UPSTREAM, CLUSTER, JOBS, MACHINE)
