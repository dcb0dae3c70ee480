"""Several workers on PostgreSQL: one aggregator to those who speak to it, also when one of its processes is killed."""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import sqlalchemy as sa
from fwdllama_eval.bench.federation.postgresql import PostgreSQL, binaries
from fwdllama_server.opening import database_url, opened
from prometheus_client.parser import text_string_to_metric_families

from fwdllama.federation.message import theta_digest
from fwdllama.federation.toy import toy_run

from .commands import Served, invoked, served
from .conftest import Member

pytest.importorskip("psycopg", reason="PostgreSQL's driver is in the extra `postgresql`")


pytestmark = pytest.mark.postgresql


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL server: the one that FWDLLAMA_POSTGRESQL names, else one of our own on loopback."""
    named = os.environ.get("FWDLLAMA_POSTGRESQL")
    if named:
        yield named
    elif binaries() is None:
        pytest.skip("needs PostgreSQL (apt install postgresql), or a server that databases may be made on in FWDLLAMA_POSTGRESQL")
    else:
        with PostgreSQL() as own:
            yield own.url


@pytest.fixture
def database(server: str) -> Iterator[str]:
    """The URL of a new database."""
    name = f"fwdllama_{secrets.token_hex(6)}"
    url = database_url(Path(), server)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


def admin(aggregator: Served) -> httpx.Client:
    key = Path(aggregator.facts["key_file"]).read_text().strip()
    return httpx.Client(base_url=aggregator.facts["url"], headers={"authorization": f"Bearer {key}"}, timeout=30)


def work(aggregator: Served, run: str, failed: list[Exception]) -> None:
    """A device that enrols, works until the run is finished, and asks again where the network fails."""
    transport = httpx.HTTPTransport(retries=10)
    try:
        with httpx.Client(base_url=aggregator.facts["url"], timeout=30, transport=transport) as client:
            header = {"authorization": f"Bearer {aggregator.facts['token']}"}
            made = client.post("/v1/devices", json={"name": "phone"}, headers=header).json()
            member = Member(client, time.time, made["device"], bytes.fromhex(made["key"]))  # type: ignore[arg-type]
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    given = member.work(run)
                except httpx.TransportError:  # its worker was killed
                    continue
                if given["wait"] and given["wait"]["finished"]:
                    return
                time.sleep(0.01)
            raise AssertionError("the run did not finish in a minute")
    except Exception as error:  # noqa: BLE001 - told by the test, in its own thread
        failed.append(error)


def workers_of(aggregator: Served) -> list[psutil.Process]:
    return [child for child in psutil.Process(aggregator.process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def test_two_workers_are_one_aggregator_even_if_one_is_killed(database: str, tmp_path: Path) -> None:
    with served(tmp_path / "aggregator", "--database", database, "--workers", 2, "--requests-per-s", 1000, "--log-format", "json") as aggregator:
        spec, initial = toy_run("toy", rounds=12, round={"probes": 40, "most": 40, "probes_per_task": 5, "lease_s": 2.0}, evaluation={"devices": 2})
        with admin(aggregator) as client:
            assert client.put(f"/v1/blobs/sha256:{spec.initial}", content=initial).status_code == 201
            assert client.post("/v1/runs", json=spec.model_dump(mode="json")).status_code == 201
            failed: list[Exception] = []
            devices = [threading.Thread(target=work, args=(aggregator, "toy", failed)) for _ in range(4)]
            for device in devices:
                device.start()
            while client.get("/v1/runs/toy").json()["version"] < 4:
                time.sleep(0.02)
            first = workers_of(aggregator)
            first[0].kill()
            for device in devices:
                device.join()
            assert failed == []
            assert len(workers_of(aggregator)) == 2
            run = client.get("/v1/runs/toy").json()
            assert (run["status"], run["version"]) == ("finished", 12)
        with httpx.Client(base_url=aggregator.facts["url"]) as client:
            made = client.post("/v1/devices", json={"name": "last"}, headers={"authorization": f"Bearer {aggregator.facts['token']}"}).json()
            theta, entries = Member(client, time.time, made["device"], bytes.fromhex(made["key"])).theta("toy")  # type: ignore[arg-type]
        assert [len(entry.seeds) for entry in entries] == [40] * 12
        assert theta_digest(theta) == run["theta_digest"]
        assert aggregator.stop() == 0
    verified = json.loads(invoked("audit", "verify", tmp_path / "aggregator", "--database", database, "--json").stdout)
    assert verified["entries"] == 12
    assert '"exit_code": -9' in aggregator.log.read_text()


def test_metrics_of_two_workers_are_summed(database: str, tmp_path: Path) -> None:
    with served(tmp_path / "aggregator", "--database", database, "--workers", 2) as aggregator:
        for _ in range(40):
            with admin(aggregator) as client:  # a connection each, so that both workers are asked
                assert client.get("/v1/tokens").status_code == 200
        pids = {child.pid for child in workers_of(aggregator)}
        with admin(aggregator) as client:
            families = text_string_to_metric_families(client.get("/metrics").text)
            samples = [s for f in families for s in f.samples if s.name == "fwdllama_http_requests_total"]
            (count,) = (s.value for s in samples if s.labels["route"] == "/v1/tokens")
        assert count == 40
        assert len(pids) == 2
        assert aggregator.stop(signal.SIGINT) == 0


def test_workers_leave_when_their_supervisor_is_killed(database: str, tmp_path: Path) -> None:
    with served(tmp_path / "aggregator", "--database", database, "--workers", 2) as aggregator:
        with admin(aggregator) as client:
            assert client.get("/ready").status_code == 200
        children = workers_of(aggregator)
        aggregator.stop(signal.SIGKILL)
        gone, alive = psutil.wait_procs(children, timeout=20)
        assert (len(gone), alive) == (2, [])


def test_revisions_make_the_schema_on_postgresql_too(database: str, tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext
    from fwdllama_server.migrations import VERSION_TABLE
    from fwdllama_server.schema import metadata

    store = opened(tmp_path, database=database).store
    options = {"version_table": VERSION_TABLE, "compare_type": True}
    found = store.view(lambda c: compare_metadata(MigrationContext.configure(c, opts=options), metadata))
    store.close()
    assert found == []
