"""The playground in a browser: arms side by side, isolated failures, texts that stay out of links and logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from structlog.testing import capture_logs

from gateway.backends.fake import fake_info
from gateway.console.arms import read_arm
from gateway.console.likeness import between, bytes_per_text, order, ranks
from gateway.errors import BadInput
from gateway.precision import Precision
from gateway.requests import EmbedAnswer
from gateway.types import Output, Timings
from tests.console.served import HOSTILE, Gateway

QUERY = "how does ada like to travel"
TEXTS = (
    "ada likes to travel by train",
    "the night train to vienna",
    "she does not eat meat",
    f"a hostile one {HOSTILE}",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen",
)


def fill(page: Any, url: str, *arms: str, texts: tuple[str, ...] = TEXTS, query: str = QUERY) -> None:
    page.goto(f"{url}/console/playground")
    page.get_by_label("Query", exact=True).fill(query)
    page.locator("#candidates").fill("\n".join(texts))
    for index in range(3):
        page.get_by_label(f"Arm {index + 1}").fill(arms[index] if index < len(arms) else "")


def test_two_arms_rank_the_same_texts(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        fill(page, gateway.url, "jina@32", "bge")
        page.locator("#candidates").press("Control+Enter")
        page.get_by_role("heading", name="Rankings").wait_for()
        ranks = page.locator("ol.rank")
        assert ranks.count() == 2
        for column in range(2):
            shown = ranks.nth(column).locator(".txt").all_inner_texts()
            assert sorted(shown) == sorted(TEXTS)
            scores = [
                float(text.replace("\u2212", "-")) for text in ranks.nth(column).locator(".num").all_inner_texts()
            ]
            assert scores == sorted(scores, reverse=True)
            assert shown[0] == TEXTS[0]  # which shares most words
        assert page.locator("svg.links line").count() == len(TEXTS)
        assert "jina@32 and bge put the same text first" in page.locator(".lead").inner_text()


def test_scores_are_those_of_the_api(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with httpx.Client(base_url=gateway.url) as client:

        def embed(texts: list[str], task: str) -> np.ndarray:
            body = {"model": "jina", "input": texts, "task": task, "dimensions": 16}
            return np.array([row["embedding"] for row in client.post("/v1/embeddings", json=body).json()["data"]])

        expected = embed(list(TEXTS), "retrieval.passage") @ embed([QUERY], "retrieval.query")[0]
    with visit(gateway.url) as page:
        fill(page, gateway.url, "jina:retrieval.query@16")
        page.get_by_role("button", name="Run").click()
        page.locator("ol.rank").wait_for()
        assert "query: retrieval.query, candidates: retrieval.passage" in page.locator(".arm-head").inner_text()
        for item in page.locator("ol.rank li").all():
            score = float(item.locator(".num").inner_text().replace("\u2212", "-"))
            assert score == pytest.approx(expected[int(item.get_attribute("data-text"))], abs=6e-4)


def test_an_arm_that_fails_leaves_the_others(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        fill(page, gateway.url, "jina", "bge", "nothing", texts=(*TEXTS, "overload"))
        page.get_by_role("button", name="Run").click()
        page.locator("ol.rank").wait_for()
        assert page.locator("ol.rank").count() == 1
        failures = page.locator(".banner.bad").all_inner_texts()
        assert "bge: 429 overloaded" in failures[0]
        assert "Try again in 2 s" in failures[0]
        assert "nothing: 404 model_not_found" in failures[1]


def test_the_page_shows_tokens_cuts_times_and_sizes(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        fill(page, gateway.url, "jina:binary", "bge+sparse")
        page.get_by_role("button", name="Run").click()
        page.locator("table.takes").wait_for()
        takes = page.locator("table.takes").inner_text()
        assert "text 5" in takes  # has 14 words, jina takes 12
        assert (
            page.locator("table.takes tr", has_text="Bytes per vector")
            .locator("td")
            .nth(0)
            .inner_text()
            .startswith("8")
        )
        reads = page.locator("section", has=page.locator("#reads")).inner_text()
        assert "1 of them from the instruction for retrieval.query" in reads
        assert "Text 5 is too long" in reads
        assert page.locator(".heat").count() == 2
        light = page.locator(".heat td").nth(3).evaluate("cell => getComputedStyle(cell).backgroundColor")
        page.get_by_label("separate scales").check()
        assert page.locator(".heat td").nth(3).evaluate("cell => getComputedStyle(cell).backgroundColor") != light


def test_the_heat_map_shows_which_pairs_another_arm_moves(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        fill(page, gateway.url, "nothing", "jina", "bge")
        page.get_by_role("button", name="Run").click()
        page.locator(".heat").first.wait_for()
        cells = [
            [float(text.replace("\u2212", "-").replace("·", "0")) for text in table.locator(".value").all_inner_texts()]
            for table in page.locator(".heat").all()
        ]
        page.locator("#scale-moved").check()
        first, other = page.locator(".heat").all()
        assert set(first.locator(".moved").all_inner_texts()) == {"·"}
        moves = other.locator(".moved").all_inner_texts()
        # Cells show two digits, so only clear moves can be checked: the pairs that are first and last.
        places = [sorted(range(len(one)), key=lambda pair: -one[pair]) for one in cells]
        up = max(range(len(moves)), key=lambda pair: places[0].index(pair) - places[1].index(pair))
        assert moves[up].startswith("+")
        assert sum(int(text.replace("\u2212", "-").replace("·", "0")) for text in moves) == 0
        shown = other.locator("tbody td").nth(up).evaluate("cell => getComputedStyle(cell).backgroundColor")
        page.get_by_label("one scale").check()
        assert other.locator("tbody td").nth(up).inner_text() not in moves
        assert other.locator("tbody td").nth(up).evaluate("cell => getComputedStyle(cell).backgroundColor") != shown


def test_a_link_keeps_the_texts_behind_the_hash(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        fill(page, gateway.url, "jina", "bge")
        page.get_by_role("button", name="Run").click()
        page.locator("ol.rank").first.wait_for()
        link = page.evaluate("location.href")
        assert "#" in link
        assert "ada" in link.split("#")[1]
        page.goto("about:blank")
        page.goto(link)
        page.locator("ol.rank").first.wait_for()  # it runs again by itself
        assert page.locator("#candidates").input_value().split("\n") == list(TEXTS)
        assert page.get_by_label("Arm 2").input_value() == "bge"
        assert not any("ada" in url.split("#")[0] for url in requests)


def test_snippets_equal_the_requests_of_the_arm(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        fill(page, gateway.url, "jina-query@32", query="it's")
        page.get_by_role("button", name="Run").click()
        page.locator("#take").wait_for()
        curl, python, mem0 = (page.locator(f"#snippet-0-{number}").text_content() for number in (1, 2, 3))
        assert f"curl {gateway.url}/v1/embeddings" in curl
        assert "it'\\''s" in curl
        assert '"dimensions": 32' in curl
        compile(python, "snippet", "exec")
        config: dict[str, Any] = {}
        exec(mem0, config)  # noqa: S102  written by the console, and meant to be run
        assert config["config"]["embedder"]["config"]["model"] == "jina:text-matching"
        assert config["config"]["embedder"]["config"]["embedding_dims"] == 32
        space = gateway.deployment.fleet.get("jina").info.space("text-matching", 32)
        assert config["config"]["vector_store"]["config"]["collection_name"].endswith(space.rpartition("@")[2])


def test_texts_are_not_logged(gateway: Gateway) -> None:
    headers = {"origin": gateway.url, "accept": "text/html"}
    fields = {
        "kind": "query",
        "query": "secretquery",
        "candidates": "secrettext\noverload secrettext",
        "arm": ["bge", "jina"],
    }
    with capture_logs() as lines:
        answer = httpx.post(f"{gateway.url}/console/playground", data=fields, headers=headers)
    assert answer.status_code == 200
    assert "secret" not in str(lines)
    assert "secret" not in httpx.get(f"{gateway.url}/v1/errors").text
    assert "secret" not in httpx.get(f"{gateway.url}/metrics").text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": "", "candidates": "a"}, "the query is empty"),
        ({"query": "a", "candidates": " \n "}, "0 texts were sent; 1 to 50 are accepted"),
        ({"query": "a", "candidates": "\n".join("abc" * 20)}, "60 texts were sent"),
        ({"kind": "texts", "candidates": "a"}, "1 texts were sent; 2 to 50"),
        ({"query": "a", "candidates": "a", "arm": ["a", "b", "c", "d"]}, "4 arms were sent; 1 to 3"),
    ],
)
def test_a_wrong_form_says_so_and_keeps_the_texts(gateway: Gateway, fields: dict[str, Any], message: str) -> None:
    answer = httpx.post(
        f"{gateway.url}/console/playground", data={"arm": ["jina"], **fields}, headers={"origin": gateway.url}
    )
    assert answer.status_code == 400
    assert message in answer.text


def test_the_playground_is_accessible(
    gateway: Gateway,
    visit: Callable[..., Any],
    check_accessibility: Callable[[Any], None],
    check_everywhere: Callable[[Any, str], None],
) -> None:
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console/playground?example=1")
        check_accessibility(page)
        page.get_by_label("Arm 3").fill("nothing")
        page.get_by_role("button", name="Run").click()
        page.locator("#take").wait_for()
        check_everywhere(page, "playground")


# --------------------------------------------------------------------------------------------------------------- pure


@pytest.mark.parametrize(
    ("text", "name", "dimensions", "precision", "output"),
    [
        ("bge-m3", "bge-m3", None, Precision.FLOAT, Output.DENSE),
        ("jina:retrieval.query@256:binary", "jina:retrieval.query", 256, Precision.BINARY, Output.DENSE),
        ("owner/model:int8", "owner/model", None, Precision.INT8, Output.DENSE),
        ("bge-m3+sparse", "bge-m3", None, Precision.FLOAT, Output.SPARSE),
        ("jina@0123456789ab", "jina@0123456789ab", None, Precision.FLOAT, Output.DENSE),  # a space in the name
    ],
)
def test_arms_are_read(text: str, name: str, dimensions: int | None, precision: Precision, output: Output) -> None:
    arm = read_arm(text)
    assert (arm.name, arm.dimensions, arm.precision, arm.output) == (name, dimensions, precision, output)


def test_a_size_of_sparse_weights_is_refused() -> None:
    with pytest.raises(BadInput, match="only dense vectors have"):
        read_arm("bge-m3@256+sparse")


def test_equal_values_share_their_ranks() -> None:
    assert ranks([0.5, 0.9, 0.5, 0.1]) == [2.5, 1, 2.5, 4]
    assert ranks([]) == []


def test_binary_vectors_are_compared_by_their_signs() -> None:
    def answer(rows: list[list[float]], precision: Precision) -> EmbedAnswer:
        info = fake_info()
        return EmbedAnswer(
            name="m", model="m", num_tokens=1, truncated=(), timings=Timings(0, 0, 0),
            vectors=np.array(rows, np.float32), has_dense=True, precision=precision, space=info.space(),
        )  # fmt: skip

    one, other = [[0.9, 0.1, -0.1, 0.2]], [[0.1, 0.9, -0.2, -0.1], [0.9, 0.1, -0.1, 0.2]]
    signs = between(answer(one, Precision.BINARY), answer(other, Precision.BINARY), Output.DENSE)
    floats = between(answer(one, Precision.FLOAT), answer(other, Precision.FLOAT), Output.DENSE)
    assert signs.tolist() == [[0.5, 1.0]]
    assert floats[0, 1] == pytest.approx(1)
    assert floats[0, 0] != pytest.approx(0.5)
    assert bytes_per_text(answer(other, Precision.UBINARY), Output.DENSE) == 1
    assert bytes_per_text(answer(other, Precision.FLOAT), Output.DENSE) == 16
    assert order([0.1, 0.5, 0.5]) == [1, 2, 0]
