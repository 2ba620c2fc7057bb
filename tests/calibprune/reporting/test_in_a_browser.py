"""The page in a real browser: what a model wrote is text there, whatever it wrote."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from calibprune.reporting.page import render_page
from tests.calibprune.reporting.example import curated_report, example_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
RUN = "document.title='RAN'"
HOSTILE = [
    f"<script>{RUN}</script>",
    f"</pre></div></section><img src=x onerror=\"{RUN}\">",
    f"\" onmouseover=\"{RUN}\" autofocus onfocus='{RUN}' x='",
    f"' onload='{RUN}' \"",
    f"</title></svg><svg onload={RUN}>",
    f"]]></style><style>@import 'javascript:{RUN}';</style><!--",
    f"<a href=\"javascript:{RUN}\">here</a><iframe srcdoc=\"<script>parent.{RUN}</script>\">",
    f"<base href=//evil><form action=//evil><meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    f"{{{{ 7*7 }}}} {{% raw %}} &lt;script&gt;{RUN}&lt;/script&gt; &#x3c;b>",
    f"\x00\x1b[2J<scr\x00ipt>{RUN}</script>",
    f"\u202e<tpircs>\u2066\u200f<script>{RUN}</script>",
]  # fmt: skip
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def opened(path: Path, page: str, profile: Path) -> str:
    """Loads a page in the browser; returns the resulting document as text."""
    path.write_text(page, encoding="utf-8", errors="surrogatepass")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8", "replace")


def title(document: str) -> str:
    found = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert found is not None
    return html.unescape(found[1])


def hostile_report() -> dict:
    """Puts a script into every text of a report that may come from a model, a file's name or an error."""
    report, everything = example_report(), " ".join(HOSTILE)
    report["samples"] = [
        {"row": row, "perplexity": 2.0, "tokens": 3, "prefix": text, "text": text}
        for row, text in enumerate(HOSTILE)
    ]
    report["config"] = {"output": everything, everything: [everything]}
    report["versions"] = {text: text for text in HOSTILE}
    for key in ("path", "dtype", "architecture"):
        report["model"][key] = everything
    report["stages"]["generate"]["losses"] = HOSTILE
    for key in ("method", "pattern", "allocation", "refine"):
        report["prune"][key] = everything
    report["generate"]["finish_reasons"] = dict.fromkeys(HOSTILE, 1)
    report["generate"]["set_aside"] = [{"reason": text, "rows": [0, 5]} for text in HOSTILE]
    report["perplexity"] = dict.fromkeys(HOSTILE, report["perplexity"]["wikitext"])
    for text in HOSTILE:
        report["prune"]["layers"][0]["linears"][text] = {
            "sparsity": 0.1,
            "relative_error": 0.2,
            "parameters": 1,
        }
        report["prune"]["layers"][0]["seconds"][text] = 1.0
    curate = curated_report()["curate"]
    curate["sources"] = dict.fromkeys(HOSTILE, curate["sources"]["self-generated"])
    curate["steps"][1]["filter"] = everything
    similarity = curate["analysis"]["similarity"]["self-generated"]
    curate["analysis"]["similarity"] = {
        text: dict.fromkeys(HOSTILE, similarity["c4"]) for text in HOSTILE
    }
    report["curate"] |= curate
    return report


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("chromium")


def test_a_browser_runs_scripts_where_it_may_and_not_under_the_pages_policy(tmp_path, profile):
    """Otherwise the next test would pass for the wrong reason."""
    page = render_page(example_report())
    scripted = page.replace("</main>", f"<script>{RUN}</script></main>")
    assert CSP.search(page) and "RAN" not in title(opened(tmp_path / "a.html", scripted, profile))
    assert title(opened(tmp_path / "b.html", CSP.sub("", scripted), profile)) == "RAN"


def test_what_a_model_wrote_is_shown_as_text(tmp_path, profile):
    """Also tries the page without its policy, since escaping alone must be enough."""
    page = CSP.sub("", render_page(hostile_report()))
    document = opened(tmp_path / "index.html", page, profile)
    assert title(document) != "RAN" and title(document).endswith("calibprune report")
    body = document[document.index("<body") :]
    tags = set(re.findall(r"<([a-zA-Z][\w-]*)", body))
    assert not tags & {
        "script",
        "img",
        "iframe",
        "form",
        "base",
        "a",
        "style",
        "object",
        "embed",
        "image",
        "input",
    }
    assert not re.search(r"<[^<>]*\s(on\w+|srcdoc)\s*=", re.sub(r'="[^"]*"', "", body))
    text = html.unescape(re.sub(r"<[^>]+>", "", body))
    for hostile in HOSTILE:
        assert re.sub("[\x00\x1b]", "\ufffd", hostile) in text
