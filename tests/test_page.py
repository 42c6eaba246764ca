"""The page of `report` in a real browser: sorting, filtering, marking, downloading, by mouse and by keyboard."""

import shutil

import pytest
import torch

from lightning_influence import Scores, SelfScores, read_decisions
from lightning_influence.report import Opinion

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> \"' שלום 🦊"
N, N_QUERIES = 10_000, 20
GENERATOR = torch.Generator().manual_seed(0)
VALUES = torch.randn(N_QUERIES, N, generator=GENERATOR)
SELF = torch.rand(N, generator=GENERATOR)


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "Expected `chromium` on the path: apt-get install -y chromium"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    train = [{"text": HOSTILE if i == 42 else f"text number {i}", "label": i % 3} for i in range(N)]
    train[42]["label"] = HOSTILE
    scores = Scores(
        VALUES, None, torch.arange(N), torch.arange(N_QUERIES), method="TracInCP", base=(torch.arange(N) + 5, None)
    )
    itself = SelfScores(torch.arange(N), SELF, "TracInCP")
    path = tmp_path_factory.mktemp("page") / "influence.html"
    return scores.report(path, self_scores=itself, train=train, queries=train, predictions=torch.arange(N) % 2)


@pytest.fixture
def page(browser, written):
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    troubles = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: troubles.append(request.url) if request.url.startswith("http") else None)
    page.goto(written.as_uri())
    yield page
    assert troubles == []
    context.close()


def ids(page):
    return [int(name.split(" ")[0]) for name in page.locator("#rows td[data-title=Id]").all_inner_texts()]


@pytest.mark.alone
def test_ten_thousand_rows_are_ready_within_two_seconds(page):
    assert int(page.evaluate("document.documentElement.dataset.ready")) < 2000
    # Interactive: a click on a title sorts all of them, in far less than a second.
    took = page.evaluate(
        "() => { const t = performance.now(); document.querySelector('#head button').click(); "
        "document.body.offsetHeight; return performance.now() - t }"
    )
    assert took < 1000
    assert ids(page) == list(range(50))
    assert page.locator("#rows tr").count() == 50


def test_rows_stand_by_self_influence_and_are_sorted_by_a_click(page):
    assert ids(page) == SELF.argsort(descending=True)[:50].tolist()
    title = page.get_by_role("button", name="Influence on all queries (sum)")
    title.click()
    totals = VALUES.double().sum(0)
    assert ids(page) == totals.argsort(descending=True)[:50].tolist()
    title.click()
    assert ids(page) == totals.argsort()[:50].tolist()
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Influence on all queries")


def test_rows_are_filtered_by_class_score_text_and_query(page):
    page.select_option("#class", label="2")
    page.fill("#low", "0.5")
    page.fill("#high", "0.6")
    fits = [i for i in range(N) if i % 3 == 2 and 0.5 <= float(f"{float(SELF[i]):.4g}") <= 0.6]
    assert f"of {len(fits):,} training examples (10,000 in all)" in page.inner_text("#status")
    assert set(ids(page)) <= set(fits)
    page.click("#clear")
    page.fill("#find", "number 77")
    assert "of 111 training examples" in page.inner_text("#status")
    page.fill("#find", "nothing has this")
    assert page.inner_text("#status") == "No training examples fit these filters."
    page.click("#clear")
    page.select_option("#query", "7")
    best, worst = VALUES[7].argsort(descending=True)[:20].tolist(), VALUES[7].argsort()[:20].tolist()
    assert ids(page) == best + worst[::-1]
    assert "Query 7\nclass 1\npredicted 1" in page.inner_text("#subject")
    page.fill("#high", "0")
    assert ids(page) == worst[::-1]


def test_queries_are_listed_and_explained(page):
    page.click("#view-queries")
    wrong, right = [i for i in range(N_QUERIES) if i % 3 != i % 2], [i for i in range(N_QUERIES) if i % 3 == i % 2]
    assert ids(page) == wrong + right
    assert "wrongly predicted ones first" in page.inner_text("#status")
    page.get_by_role("button", name="Strongest proponent").click()
    assert ids(page) == VALUES.max(1).values.argsort(descending=True).tolist()
    page.select_option("#class", label="1")
    assert set(ids(page)) == {i for i in range(N_QUERIES) if i % 3 == 1}
    query = ids(page)[0]
    page.get_by_role("button", name=f"Explain query {query}", exact=True).click()
    assert page.input_value("#query") == str(query)
    assert ids(page)[0] == int(VALUES[query].argmax())


def test_pages_are_turned(page):
    order = SELF.argsort(descending=True).tolist()
    page.click("#next")
    assert ids(page) == order[50:100]
    page.fill("#page", "200")
    page.locator("#page").press("Enter")
    assert ids(page) == order[-50:]
    assert page.is_disabled("#next")
    page.click("#first")
    assert ids(page) == order[:50]


def test_decisions_are_marked_kept_downloaded_and_read_back(page, tmp_path):
    assert page.is_disabled("#download")
    order = SELF.argsort(descending=True).tolist()
    for row, word in ((0, "wrong label"), (1, "fine"), (2, "unsure"), (3, "wrong label"), (4, "wrong label")):
        page.locator("#rows tr").nth(row).get_by_role("button", name=word).click()
    page.locator("#rows tr").nth(4).get_by_role("button", name="wrong label").click()  # taken back
    assert page.inner_text("#marked") == "Decisions: 2 wrong label, 1 fine, 1 unsure."
    page.reload()
    page.select_option("#decided", "wrong label")
    assert ids(page) == [order[0], order[3]]
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "decisions.csv")
    assert download.value.suggested_filename == "decisions.csv"
    found = read_decisions(tmp_path / "decisions.csv")
    assert found.train_ids.tolist() == sorted([order[0], order[3]])
    assert found.base_ids.tolist() == [i + 5 for i in sorted([order[0], order[3]])]
    assert read_decisions(tmp_path / "decisions.csv", "fine").train_ids.tolist() == [order[1]]


def test_the_keyboard_is_enough(page):
    order = SELF.argsort(descending=True).tolist()
    for key in ("j", "1", "j", "j", "2", "k", "3", "n", "1", "k", "0"):
        page.keyboard.press(key)
    assert page.inner_text("#marked") == "Decisions: 2 wrong label, 1 fine, 1 unsure."
    page.keyboard.press("1")
    assert page.inner_text("#marked") == "Decisions: 3 wrong label, 1 fine, 1 unsure."
    assert page.evaluate("document.activeElement.dataset.at") == str(order[49])
    page.keyboard.press("/")
    page.keyboard.type("number 123")
    assert 123 in ids(page)
    page.click("#view-queries")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    assert page.is_visible("#subject")


def test_hostile_text_is_shown_as_text(page):
    page.fill("#find", "42")
    page.get_by_role("button", name="Id", exact=True).click()
    row = page.locator('#rows tr[data-at="42"]')
    assert row.locator(".text").inner_text() == HOSTILE
    assert row.locator("td[data-title=Class]").inner_text() == HOSTILE
    assert row.locator(".text").get_attribute("dir") == "auto"
    assert page.locator("#rows img").count() == 0
    assert page.title() == "TracInCP: 20 queries, 10,000 training examples"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(browser, written, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto(written.as_uri())
    page.select_option("#query", "7")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#rows tr").first.get_by_role("button").first.is_visible()
    assert page.get_by_role("button", name="Self-influence").is_visible()
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 23, 29)")
    page.close()


def test_targets_of_a_regression_have_a_range_and_no_list(browser, tmp_path):
    data = [(torch.zeros(2), float(y)) for y in torch.linspace(-1, 1, 60)]
    scores = Scores(VALUES[:5, :60], None, torch.arange(60), torch.arange(5), method="M")
    page = browser.new_page()
    page.goto(scores.report(tmp_path / "page.html", train=data, queries=data, predictions=torch.rand(60)).as_uri())
    assert not page.locator("#class").is_visible()
    page.select_option("#ranged", label="Target")
    page.fill("#low", "0.5")
    assert set(ids(page)) == {i for i, (_, y) in enumerate(data) if float(f"{y:.4g}") >= 0.5}
    page.get_by_role("button", name="Target", exact=True).click()
    assert ids(page)[0] == 59
    assert page.inner_text("#first-decision") == "wrong target"
    page.get_by_role("button", name="wrong target: training example 59").click()
    assert page.inner_text("#marked") == "Decisions: 1 wrong target, 0 fine, 0 unsure."
    page.close()


def test_the_page_tells_what_the_model_thinks_the_telling_queries_first(browser, tmp_path):
    data = [(torch.rand(3, 4, 4), i % 40) for i in range(60)]  # forty classes without names
    scores = Scores(VALUES[:5, :60], None, torch.arange(60), torch.arange(5), method="M")
    losses = [0.1, 3.0, 0.5, 9.0, 2.0]
    scores.opinions = lambda side, ids: {
        i: Opinion(losses[i % 5], (i + (i in (1, 4))) % 40, 0.5, i not in (1, 4)) for i in ids
    }
    page = browser.new_page()
    page.goto(scores.report(tmp_path / "page.html", train=data, queries=data).as_uri())
    assert page.locator("#rows img").first.get_attribute("alt").startswith("training example ")
    assert "Above 0, training on the example made the queries better in all" in page.inner_text("caption")
    assert page.locator("#class").is_visible()
    page.click("#view-queries")
    assert ids(page) == [1, 4, 3, 2, 0]
    assert page.locator("#rows img").first.get_attribute("alt") == "query 1, class 1, predicted 2"
    assert page.locator("#rows .negative bdi").all_inner_texts() == ["2", "5"]
    page.get_by_role("button", name="Explain query 1", exact=True).click()
    assert "class 1\npredicted 2 (wrong), probability 0.5\nloss 3" in page.inner_text("#subject")
    assert "Influence on query 1: above 0, training on the example made this query better" in page.inner_text("caption")
    page.close()


def test_whole_numbers_are_shown_whole(browser, tmp_path):
    data = [(torch.zeros(2), 123_456 + i) for i in range(60)]
    scores = Scores(VALUES[:5, :60], None, torch.arange(60), torch.arange(5), method="M")
    page = browser.new_page()
    page.goto(scores.report(tmp_path / "page.html", train=data).as_uri())
    page.get_by_role("button", name="Target", exact=True).click()
    assert page.locator("#rows td[data-title=Target]").first.inner_text() == "123515"
    page.close()
