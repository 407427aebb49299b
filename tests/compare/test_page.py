"""The page is self-contained, escapes texts, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from gateway.compare.page import render_page
from gateway.compare.plots import make_plots
from gateway.compare.results import PRIMARY_MEASURE, Comparison, Hit, QueryResult, Verdict
from gateway.compare.sentences import MINUS
from tests.compare.conftest import Browse
from tests.compare.results_example import BGE, JINA, JINA_CUT, MINILM, Likeness, make_comparison

EVIL = (
    """</script><script>alert(1)</script><img src=x onerror=alert(2)> <!--<script> "'&lt;b&gt;%{x} {{ 7 * 7 }} \u2028"""
)
EVIL_NAME = "bge</title><b>&\"'"
TWIN = replace(JINA, name="jina-embeddings-v3@1024")


class Page(HTMLParser):
    """The contents of a page: its elements, the URLs that it would load, its visible text, and its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in {"script", "style"}:
            self._inside = tag
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return make_comparison(JINA, BGE, JINA_CUT, MINILM)


@pytest.fixture(scope="module")
def html(comparison: Comparison) -> str:
    return render_page(comparison)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def drawings_of(html: str) -> dict[str, str]:
    """Return each drawing by the id of its plot, as a browser without scripts gets it."""
    found = re.findall(r'<div class="plot[^"]*" id="([^"]+)">(<svg class="drawing".*?</svg>)</div>', html, re.DOTALL)
    return dict(found)


def titles_of(drawing: str) -> list[str]:
    """Return the texts that a reader sees who points at the parts of a drawing."""
    return [unescape(title) for title in re.findall("<title>(.*?)</title>", drawing, re.DOTALL)]


def with_texts(comparison: Comparison, text: str) -> Comparison:
    """Put ``text`` wherever a user could have written something."""

    def change_hit(hit: Hit) -> Hit:
        return replace(hit, text=text, document=f"{hit.document}{text}")

    def change(query: QueryResult) -> QueryResult:
        rankings = {name: [change_hit(hit) for hit in hits] for name, hits in query.rankings.items()}
        return replace(query, id=f"{query.id}{text}", text=text, rankings=rankings)

    return replace(
        comparison,
        source=text,
        notes=[text],
        versions={text: text},
        dataset=replace(comparison.dataset, folder=text, split=text),
        arms=[replace(arm, space=text, device=text, query_task=text) for arm in comparison.arms],
        queries=[change(query) for query in comparison.queries],
    )


def test_every_section_is_there(page: Page) -> None:
    for heading in (
        "Bottom line", "Side by side", "Plots", "Example queries", "Method and provenance", "How to read it",
    ):  # fmt: skip
        assert heading in page.words
    assert len(page.all("h1")) == 1
    assert len(page.all("main")) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_every_arm_has_its_verdict_its_column_and_its_plots(comparison: Comparison, page: Page, html: str) -> None:
    chips = {str(attributes.get("class")) for attributes in page.all("span")}
    assert {"chip better", "chip worse", "chip inconclusive"} <= chips
    assert "bge-m3 is better than jina-embeddings-v3: nDCG@10 +0.0" in page.words
    assert "after Holm); " in page.words
    assert f"all-minilm-l6-v2 is worse than jina-embeddings-v3: nDCG@10 {MINUS}0." in page.words
    for arm in comparison.arms:
        assert arm.space in page.words
        assert arm.name in page.words
    assert set(drawings_of(html)) == {
        "plot-quality", "plot-differences", "plot-latency", "plot-sizes",
        "plot-queries-1", "plot-queries-2", "plot-queries-3",
    }  # fmt: skip


def test_the_figures_of_the_table_are_those_of_the_comparison(comparison: Comparison, page: Page) -> None:
    for arm in comparison.arms:
        estimate = arm.quality[PRIMARY_MEASURE]
        assert f"{estimate.mean:.3f} {estimate.low:.3f} to {estimate.high:.3f}" in page.words
    assert comparison.dataset.sha256 in page.words
    assert "ir-measures 0.4.3" in page.words


def test_plots_and_tables_have_titles_and_descriptions(page: Page, html: str) -> None:
    plots = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(plots) == len(drawings_of(html)) == len(page.all("figure"))
    assert all(len(str(attributes["aria-label"])) > 40 for attributes in plots)
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("figcaption")) == len(page.all("figure"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {str(attributes["href"]) for attributes in page.all("a")}
    assert targets <= {f"#{identity}" for identity in ids}


@pytest.mark.parametrize("has_judgments", [True, False])
def test_nothing_is_loaded(has_judgments: bool) -> None:
    html = render_page(make_comparison(has_judgments=has_judgments, num_queries=40))
    page = Page(html)
    loading = {"src", "srcset", "href", "action", "poster", "background"}
    urls = [value for _, attributes in page.tags for name, value in attributes.items() if name in loading]
    assert all(str(value).startswith("#") for value in urls)
    assert not {"link", "iframe", "img", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    styles = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in styles
    assert "@import" not in styles
    # The page's policy forbids it as well.
    assert any(str(attributes.get("content")).startswith("default-src 'none'") for attributes in page.all("meta"))


@pytest.mark.parametrize("has_judgments", [True, False])
def test_texts_are_shown_and_never_read(has_judgments: bool) -> None:
    def render(suffix: str, text: str) -> Page:
        likenesses = (replace(one, name=f"{one.name}@{suffix}") for one in (JINA, BGE))
        comparison = make_comparison(*likenesses, has_judgments=has_judgments, num_queries=40)
        return Page(render_page(with_texts(comparison, text)))

    plain, page = render("cut", "harmless"), render(EVIL_NAME, EVIL)

    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert len(page.scripts) == len(plain.scripts)
    assert " ".join(EVIL.split()) in page.words
    assert EVIL_NAME in page.words


def test_half_a_surrogate_pair_does_not_spoil_the_file() -> None:
    html = render_page(with_texts(make_comparison(JINA, BGE, num_queries=5), "half \ud83d a pair"))
    assert "half ? a pair" in html
    html.encode("utf-8")


def test_long_texts_are_cut() -> None:
    plain = render_page(make_comparison(JINA, BGE, num_queries=40))
    html = render_page(with_texts(make_comparison(JINA, BGE, num_queries=40), "word " * 400))
    assert "word word…" in html
    assert len(html) < len(plain) + 4_000_000


def test_without_judgments_the_page_reports_a_difference() -> None:
    html = render_page(make_comparison(has_judgments=False))
    page = Page(html)
    assert "A difference, not a quality." in page.words
    assert "of their first ten documents in common" in page.words
    assert "is better" not in page.words
    assert set(drawings_of(html)) == {"plot-overlap-1", "plot-rbo-1", "plot-overlap-2", "plot-rbo-2"}
    assert "Ranked least alike" in page.words
    assert "not judged" not in page.words


def test_histograms_count_every_query_once() -> None:
    drawings = drawings_of(render_page(make_comparison(has_judgments=False, num_queries=73)))
    counts = [re.findall(r": (\d+) of 73 queries", "\n".join(titles_of(drawing))) for drawing in drawings.values()]
    assert [sum(map(int, found)) for found in counts] == [73, 73, 73, 73]


def test_an_empty_plot_is_not_drawn() -> None:
    assert "plot-latency" not in drawings_of(render_page(make_comparison(has_cost=False)))
    one_size = drawings_of(render_page(make_comparison(JINA, BGE)))
    assert "plot-sizes" not in one_size
    assert "plot-latency" in one_size


def test_an_arm_without_cost_is_named() -> None:
    comparison = make_comparison()
    arms = [*comparison.arms[:2], replace(comparison.arms[2], cost=None)]
    html = render_page(replace(comparison, arms=arms))
    assert len(titles_of(drawings_of(html)["plot-latency"])) == 2
    assert "Not measured: jina-embeddings-v3@256." in Page(html).words


@pytest.mark.parametrize("has_judgments", [True, False])
def test_one_query(has_judgments: bool) -> None:
    page = Page(render_page(make_comparison(num_queries=1, has_judgments=has_judgments)))
    assert "1 query over" in page.words
    assert ("1 query is too few to distinguish" in page.words) == has_judgments


def test_too_few_queries_says_how_many() -> None:
    page = Page(render_page(make_comparison(num_queries=14)))
    assert "14 queries are too few to distinguish bge-m3 from jina-embeddings-v3" in page.words
    assert Verdict.TOO_FEW_QUERIES in page.words


def test_inconclusive_says_between_which_bounds() -> None:
    page = Page(render_page(make_comparison(JINA, JINA_CUT)))
    assert re.search(
        r"not show whether jina-embeddings-v3@256 is better or worse than jina-embeddings-v3: nDCG@10 "
        rf"{MINUS}0\.\d\d\d \(95 % interval {MINUS}0\.\d\d\d to \+0\.\d\d\d, p = 0\.\d\d\d\); \d+ wins, \d+ ties, "
        r"\d+ losses\. 200 queries like these show a difference of 0\.\d\d\d in 80 % of comparisons; one of 0\.02 needs",
        page.words,
    )
    assert "after Holm)" not in page.words, "one arm needs no correction"


def test_inconclusive_beyond_the_interval_says_why() -> None:
    comparison = make_comparison(JINA, BGE)
    contrasts = [replace(contrast, p_holm=0.06) for contrast in comparison.contrasts]
    contrasts[0] = replace(contrasts[0], verdict=Verdict.INCONCLUSIVE)
    assert contrasts[0].difference.low > 0
    page = Page(render_page(replace(comparison, contrasts=contrasts)))
    assert "The interval excludes 0, but p is not small enough to rely on that." in page.words


@pytest.mark.parametrize("has_judgments", [True, False])
def test_no_difference_at_all(has_judgments: bool) -> None:
    html = render_page(make_comparison(JINA, TWIN, has_judgments=has_judgments))
    page = Page(html)
    assert 'class="query"' not in html
    assert f"{MINUS}0.000" not in page.words
    if has_judgments:
        assert "0 wins, 200 ties, 0 losses" in page.words
        assert "plot-queries-1" not in drawings_of(html)


def test_two_thousand_queries_are_a_bar_each_and_the_page_stays_small() -> None:
    comparison = make_comparison(num_queries=2000)
    html = render_page(comparison)
    for contrast in comparison.contrasts:
        if contrast.measure == PRIMARY_MEASURE:
            number = [arm.name for arm in comparison.arms].index(contrast.arm)
            drawing = drawings_of(html)[f"plot-queries-{number}"]
            assert drawing.count("<rect") == contrast.wins + contrast.losses
    assert len(html) < 800_000


@pytest.mark.parametrize("likenesses", [(JINA, BGE), (JINA, BGE, JINA_CUT), (JINA, BGE, JINA_CUT, MINILM)])
def test_a_report_is_small(likenesses: tuple[Likeness, ...]) -> None:
    assert len(render_page(make_comparison(*likenesses, num_queries=300)).encode()) < 400_000


def test_bars_are_sorted_and_say_both_values(comparison: Comparison, html: str) -> None:
    drawing = drawings_of(html)["plot-queries-1"]
    gains = {query.id: query.quality[BGE.name][PRIMARY_MEASURE] - query.quality[JINA.name][PRIMARY_MEASURE]
             for query in comparison.queries}  # fmt: skip
    titles = titles_of(drawing)
    shown = [float(title.rpartition(" ")[2].replace(MINUS, "-")) for title in titles]
    assert shown == sorted(shown, reverse=True)
    assert shown == [round(gain, 3) for gain in sorted(gains.values(), reverse=True) if gain]
    best = max(comparison.queries, key=lambda query: gains[query.id])
    assert titles[0].startswith(best.text)
    for name in (BGE.name, JINA.name):
        assert f"{name} {best.quality[name][PRIMARY_MEASURE]:.3f}" in titles[0]


@pytest.mark.parametrize("has_judgments", [True, False])
def test_drawings_are_sound(has_judgments: bool) -> None:
    """Each is XML, and nothing is drawn outside."""
    html = render_page(make_comparison(JINA, BGE, JINA_CUT, MINILM, has_judgments=has_judgments))
    for drawing in drawings_of(html).values():
        root = ElementTree.fromstring(drawing)  # noqa: S314  made here
        shares = [
            float(value.removesuffix("%"))
            for element in root.iter()
            for name, value in element.attrib.items()
            if name in {"x", "x1", "x2"} and value.endswith("%")
        ]
        assert min(shares) >= 0
        assert max(shares) <= 100
        heights = [
            float(element.attrib[name]) for element in root.iter() for name in ("y1", "y2") if name in element.attrib
        ]
        assert all(-0.1 <= height <= float(root.attrib["height"]) + 0.1 for height in heights)


def test_a_document_that_both_rankings_have_is_linked_both_ways() -> None:
    html = render_page(make_comparison(JINA, BGE, num_queries=40))
    links = {
        identity: target.group(1)
        for identity, body in re.findall(r'<tr id="([^"]+)"[^>]*>(.*?)</tr>', html, re.DOTALL)
        if (target := re.search(r'href="#([^"]+)"', body))
    }
    assert links
    assert all(links[target] == identity for identity, target in links.items())


def test_arms_differ_in_color_and_shape() -> None:
    likenesses = [
        replace(JINA, name=f"{JINA.name}@{width}", width=width) for width in (1024, 768, 512, 256, 128, 64, 32)
    ]
    plot = next(plot for plot in make_plots(make_comparison(*likenesses, num_queries=5)) if plot.id == "plot-quality")
    looks = re.findall(r'<svg class="point"[^>]*fill="([^"]+)">.*?<(circle|rect|path[^>]*)', plot.svg)
    assert len(set(looks)) == 7


def test_the_command_line_starts_without_it() -> None:
    code = "import gateway.cli.main, sys; sys.exit(bool({'jinja2.environment'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("has_judgments", [True, False])
def test_a_browser_finds_nothing_to_complain_about(browse: Browse, has_judgments: bool) -> None:
    comparison = with_texts(make_comparison(JINA, replace(BGE, name=EVIL_NAME), has_judgments=has_judgments), EVIL)
    dom, complaints = browse(render_page(comparison))
    assert complaints == ""
    assert dom.count('class="drawing"') == len(make_plots(comparison))
    assert "onerror=alert(2)&gt;" in dom
