"""Each architecture gives the vectors that sentence-transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from .conftest import FAMILIES, TEXTS
