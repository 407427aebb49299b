"""The folder of comparisons."""

from __future__ import annotations

import json
from pathlib import Path

from gateway.comparisons.runs import Runs


def test_all_queries_of_a_large_comparison_are_read(tmp_path: Path) -> None:
    """The worst query may be the last."""
    folder = tmp_path / "large"
    folder.mkdir()
    num = 20_500
    lines = (
        json.dumps(
            {
                "id": f"q{i}",
                "text": "a",
                "rankings": {},
                "quality": {"old": {"nDCG@10": 1.0}, "new": {"nDCG@10": 0.0 if i == num - 1 else 1.0}},
            }
        )
        for i in range(num)
    )
    (folder / "queries.jsonl").write_text("\n".join(lines))

    [worst] = Runs(tmp_path).worst("large", "new", "old", 10, is_gained=False)

    assert worst.id == f"q{num - 1}"
