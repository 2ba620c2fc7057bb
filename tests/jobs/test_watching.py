"""Units on real Ray actors as a watcher sees them: names, metrics and the dashboard, the log, the failure files."""

import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import promql_parser
import pytest
import ray
from grafana_foundation_sdk.models.dashboard import Dashboard

from calibprune.events import (
    SET_ASIDE,
    Event,
    Lost,
    StageBegun,
    UnitDone,
    emit,
    listening,
)
from calibprune.failures import FailureFiles, read_failures
from calibprune.process import node
from calibprune.stage import Record, Stage
from cluster.crew import Crew
from cluster.label import label_of
from cluster.metrics import StageMetrics, WorkMetrics
from cluster.places import Bundle
from cluster.queue import work_through
from jobs import output
from tests.cluster.nodes import cluster_of, metrics_url

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "calibprune.json"
LAYER = {
    "layer": 0, "worker": 0, "bytes_read": 10, "bytes_written": 8, "peak_memory_bytes": 5,
    "seconds": {"solve": 0.5}, "linears": {"q_proj": {"zeros": 1, "parameters": 2, "relative_error": 0.1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_metrics_report_interval_ms"] = "500"  # noqa: SIM112
    try:
        with cluster_of(2, metrics=True):
            yield
    finally:
        del os.environ["RAY_metrics_report_interval_ms"]  # noqa: SIM112


class Worker:
    """Commits units, reports like the real workers, and fails at unit 1 the first time."""

    def __init__(self, stage_url: str) -> None:
        self._stage, self._failed = Stage(stage_url), False

    def start(self) -> str:
        self._metrics = WorkMetrics(label_of(self._stage.url))
        with listening(self._metrics):
            emit(UnitDone(Record("layer-00000", None, 0, None, LAYER)))
        return node()

    def work(self, units: Sequence[str]) -> Iterator[Event]:
        for unit in units:
            if unit == "1" and not self._failed:
                self._failed = True
                raise ValueError("no luck with https://me:secret@store/x?X-Amz-Signature=abcdef")
            facts = {"rows": 2, "tokens": 6, "seconds": 0.25, "finish_reasons": {"stop": 2}}
            with listening(self._metrics):
                yield emit(UnitDone(self._stage.commit(unit, None, facts)))

    def name(self) -> str:
        return ray.get_runtime_context().get_actor_name() or ""


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def served() -> dict[str, list[str]]:
    """Returns the lines of every metric that the nodes serve, by name."""
    found: dict[str, list[str]] = {}
    for one in ray.nodes():
        for line in (
            urllib.request.urlopen(metrics_url(one), timeout=10).read().decode().splitlines()
        ):
            if not line.startswith("#"):
                found.setdefault(re.split(r"[{ ]", line)[0], []).append(line)
    return found


@pytest.mark.slow  # beside other tests Ray's agent may serve what processes report minutes late, or never
def test_all_that_the_dashboard_shows_is_served_and_the_log_and_the_journal_say_what_failed(
    cluster, tmp_path, capfd
):
    stage = Stage(str(tmp_path / "my-run" / "generate"))
    units = ["0", "1", "2", "3"]
    stage.plan({}, units)
    label = label_of(stage.url)
    output.set_up("json")
    try:
        with (
            listening(FailureFiles(stage.url), StageMetrics(label)),
            Crew(
                Worker, 1, Bundle(1, 0), [stage.url], start_seconds=240, concurrency=1, label=label
            ) as crew,
        ):  # fmt: skip
            named = None
            emit(StageBegun(label.run, label.stage, len(units), 0))
            for event in work_through(crew, "work", [[unit] for unit in units]):
                if isinstance(event, UnitDone):
                    named = named or ray.get(crew.ready[0].handle.name.remote())
            assert named == "calibprune:my-run:generate:engine-0"
            wanted = {name for one in expressions() for name in re.findall(r"\bray_\w+", one)}
            assert len(wanted) > 12
            deadline = time.monotonic() + 120
            found = served()
            while wanted - found.keys() and time.monotonic() < deadline:
                time.sleep(0.2)
                found |= (
                    served()
                )  # a gauge that is set once is served for four reporting intervals only
        assert wanted - found.keys() == set()
        for name in (one for one in wanted if "calibprune" in one):
            assert all(
                'run="my-run"' in line and 'stage="generate"' in line for line in found[name]
            )
        (failures,) = found["ray_calibprune_failures_total"]
        assert 'kind="unit"' in failures and float(failures.rsplit(" ", 1)[-1]) == 1
    finally:
        output.set_up("text")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[:1] == "{"]
    committed = {line["unit"]: line for line in lines if line["event"] == "unit"}
    assert committed.keys() == set(units)
    known = {"run": "my-run", "stage": "generate", "node": node(), "seconds": 0.25, "tokens": 6}
    assert all(committed["1"][key] == value for key, value in known.items())
    assert (committed["0"]["attempt"], committed["1"]["attempt"]) == (1, 2)
    (failed,) = (line for line in lines if line["event"] == "failure")
    assert (failed["unit"], failed["attempt"], failed["node"]) == ("1", 1, node())
    count, (noted,) = read_failures(stage.url)
    assert count == 1
    assert (noted.kind, noted.units, noted.attempt, noted.node) == ("unit", ("1",), 1, node())
    for text in (failed["message"], noted.message):
        assert "no luck with https://***@store/x" in text
        assert "secret" not in text and "abcdef" not in text


def test_the_dashboard_is_grafanas_and_its_queries_are_promql():
    content = json.loads(DASHBOARD.read_text())
    dashboard = Dashboard.from_json(content)
    assert dashboard.title == "calibprune" and len(dashboard.panels or ()) == len(content["panels"])
    again = json.loads(json.dumps(dashboard.to_json(), default=lambda part: part.to_json()))
    for kept, panel in zip(again["panels"], content["panels"], strict=True):
        for key in ("type", "title", "gridPos"):
            assert kept[key] == panel[key]
        assert [one["expr"] for one in kept["targets"]] == [one["expr"] for one in panel["targets"]]
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])
    cells = [
        (x, y)
        for panel in content["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    names = {one["name"] for one in content["templating"]["list"]}
    for expression in expressions():
        promql_parser.parse(expression)
        assert set(re.findall(r"\$\{?(\w+)", expression)) <= names


def test_a_store_that_refuses_is_said_and_nothing_is_raised(tmp_path, heard):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prune").write_text("a file where the folder should be")
    with listening(FailureFiles(str(tmp_path / "run" / "prune"))):
        for _ in range(3):
            emit(Lost("worker", "gone", ("layer-00001",)))
    assert heard.text.count("cannot write to") == 1


def test_a_unit_that_is_set_aside_is_no_further_attempt(tmp_path, capfd):
    url = str(tmp_path / "run" / "generate")
    output.set_up("json")
    try:
        with listening(FailureFiles(url)):
            emit(StageBegun("run", "generate", 2, 0))
            emit(Lost("unit", "bad", ("0",), 3))
            emit(Lost(SET_ASIDE, "bad", ("0",), 3))
            emit(UnitDone(Record("0", None, 0, None)))
    finally:
        output.set_up("text")
    assert read_failures(url)[0] == 2
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["failure", "failure", "unit"]
    assert lines[-1]["attempt"] == 2
