"""The page: it stands alone, holds the summary's own numbers, says what it has not, and shows text as text."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from replay.metrics import SenderFacts, ServerFacts, ServerOverTime, Slo, Summary, Tally, Workload
from replay.page import distributions_of, figures_of, page
from replay.sample import Sample
from replay.verdict import Limits, judged
from traces.record import Outcome

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


class Page(HTMLParser):
    """What a browser would make of it: elements, text by element, scripts by id."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(data.decode())
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("id"), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            name, text = self.scripts[-1]
            self.scripts[-1] = (name, text + data)
        elif data.strip() and self._open[-1] != "style":
            self.text.append(data.strip())

    def data(self, name: str) -> Any:
        (text,) = [text for each, text in self.scripts if each == name]
        return msgspec.json.decode(text)


def sample(second: float, **changes: object) -> Sample:
    plain = Sample(
        index=0, due_s=second, sent_s=second + 0.001, dispatch_lag_s=0.001, wake_lag_s=0.0005, ttft_s=0.1, tpot_s=0.02,
        e2e_s=0.5, e2e_from_due_s=0.501, request_tokens_asked=10, request_tokens_got=10, response_tokens_asked=20,
        response_tokens_got=20, status=200, outcome=Outcome.OK, ttft_from_due_s=0.101,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


SERVER = ServerFacts(
    urls=("http://h/metrics",), scrapes=3, failed_scrapes=0, error=None, kv_max=0.5, kv_mean=0.3, running_max=4.0,
    waiting_max=1.0, preemptions=2.0, prefix_hit_share=0.25, prompt_tokens=1.0, generation_tokens=1.0,
    over_time=ServerOverTime(at_s=[0.5, 1.5, 2.5], running=[1.0, 4.0, 2.0], waiting=[0.0, 1.0, 0.0],
                             kv_share=[0.1, 0.5, None], preemptions=[0.0, 1.0, 2.0], prefix_hits=[0.0, 0.0, 0.0],
                             prefix_queries=[0.0, 0.0, 0.0], prompt_tokens=[0.0, 0.0, 0.0],
                             generation_tokens=[0.0, 0.0, 0.0]),
)  # fmt: skip
SENDER = SenderFacts(
    name=EVIL, host="h", sent=1, dispatch_lag_s=None, wake_lag_s=None, cpu_share=0.5, stall_max_s=0.01, lost=EVIL
)
WORKLOAD = Workload(
    target=EVIL, model=EVIL, endpoint="chat", stream=True, run_id=EVIL, speed=1.0, seed=0, ties="spread", rows_read=9,
    started_at=1_700_000_000.0, senders=(SENDER,), server=SERVER,
)  # fmt: skip


@pytest.fixture(scope="module")
def summary() -> Summary:
    tally = Tally(Slo(ttft_s=0.05))
    for second in range(5):
        tally.add(sample(float(second)))
    tally.add(sample(1.5, outcome=Outcome.UPSTREAM_ERROR, status=500, error=EVIL))
    tally.add(sample(1.5, sent_s=None, e2e_s=None, outcome=Outcome.CONNECT_ERROR, error="refused"))
    return judged(tally.summary(WORKLOAD, 3), Limits())


@pytest.fixture(scope="module")
def shown(summary: Summary) -> Page:
    return Page(page(summary))


def test_nothing_is_loaded_from_anywhere(shown: Page) -> None:
    loaded = {
        (tag, name, value)
        for tag, attributes in shown.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "background", "poster") or "url(" in (value or "")
    }
    assert loaded == set()
    assert not {tag for tag, _ in shown.tags} & {"link", "iframe", "object", "embed", "base", "img"}
    (policy,) = [each["content"] for _, each in shown.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; ")
    assert "http" not in str(policy)
    assert any(len(text) > 1_000_000 and "Plotly" in text for _, text in shown.scripts), "plotly.js is inside"
    assert any(each.get("name") == "viewport" for _, each in shown.tags)


def test_the_verdict_comes_first_and_in_words(shown: Page, summary: Summary) -> None:
    headings = [tag for tag, _ in shown.tags if tag in ("h1", "h2")]
    assert headings[0] == "h1"
    text = [each for each in shown.text if each != shown.text[0]]  # the title
    assert text[0].startswith("INVALID: the replay was the bottleneck")
    assert text[1 : 1 + len(summary.reasons)] == [" ".join(reason.split()) for reason in summary.reasons]
    assert "What was run" in text


def test_the_page_holds_the_summary(shown: Page, summary: Summary) -> None:
    assert msgspec.convert(shown.data("summary"), Summary) == summary
    assert shown.data("figures") == [
        {"id": f"f{n}", **each} for n, each in enumerate(figures_of(summary)) if each["traces"]
    ]


def test_the_pictures_are_of_the_summary(summary: Summary) -> None:
    lines = {(each["title"], trace["name"]): (trace["x"], trace["y"])
             for each in figures_of(summary) for trace in each["traces"]}  # fmt: skip
    time, server = summary.over_time, SERVER.over_time
    assert server is not None
    seconds = [float(n) for n in range(len(time.offered))]
    assert lines["Requests", "offered"] == (seconds, time.offered)
    assert lines["Requests", "failed"] == (seconds, time.failed)
    assert lines["In flight", "in flight, mean"] == (seconds, time.in_flight)
    assert lines["Dispatch lag", "largest"][1][0] == 1.0
    assert lines["KV-cache use, by the server", "used"] == (server.at_s, [10.0, 50.0, None])
    assert lines["Requests in the server", "waiting"] == (server.at_s, server.waiting)
    assert lines["Preemptions, since the start", "preempted"] == (server.at_s, server.preemptions)
    assert lines["Failures by class", "failed"] == ([1, 1], ["connect", "http_5xx"])
    assert lines["How many within: end to end", "requests"] == ([500.0, 500.0], [0.0, 100.0])


def test_every_distribution_is_in_the_table(shown: Page, summary: Summary) -> None:
    for name, value in distributions_of(summary):
        assert name in shown.text
        assert value is not None or name == "Gap between chunks"  # no sample here had one
    assert "Held back by the limit in flight" not in shown.text


def test_text_from_outside_is_text(shown: Page) -> None:
    names = [name for name, _ in shown.scripts]
    assert names == ["summary", "figures", None, None]
    assert not any("onerror" in attributes for _, attributes in shown.tags)
    assert any(EVIL in text for text in shown.text)
    assert all("alert(" not in text for name, text in shown.scripts if name is None)


def test_a_run_of_nothing_says_so() -> None:
    empty = judged(Tally().summary(Workload(), 0), Limits())
    found = Page(page(empty))
    assert "MISSED" in found.text
    assert "no request was sent and measured" in found.text
    assert "No data: no request was sent." in found.text
    assert "No data: the target's own metrics were not scraped." in found.text
    assert found.data("figures") == []
    assert not any("None" in text or "nan" in text for text in found.text)


def test_a_run_that_failed_altogether_has_its_page() -> None:
    tally = Tally(Slo(ttft_s=0.1))
    tally.add(sample(0.0, sent_s=None, e2e_s=None, ttft_s=None, outcome=Outcome.CONNECT_ERROR, error="refused"))
    found = Page(page(judged(tally.summary(Workload(), 1), Limits(max_error_rate=0.0))))
    assert "100.00 % of the requests failed, at most 0.00 % may" in found.text
    assert "No data: no request ended well." in found.text
    assert [each["title"] for each in found.data("figures")] == ["Requests", "In flight", "Dispatch lag",
                                                                 "Response tokens", "Failures by class"]  # fmt: skip
