"""What devices have trained through the aggregator is what the model server answers with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx
import numpy as np
from fwdllama_server.app import create_app
from fwdllama_server.inference.engine import open_engine
from fwdllama_server.inference.exchange import Asked
from fwdllama_server.inference.follow import AggregatorSource
from fwdllama_server.inference.sampling import Sampling
from fwdllama_server.limits import Limits
from fwdllama_server.opening import opened

from fwdllama.federation.toy import MATRIX, toy_run
from gguf_tools.adapter import BASE_KEY, Adapter, adapter_bytes
from gguf_tools.model import ModelInfo, file_sha256
from tests.server.conftest import Aggregator, Clock
from tests.server.inference.conftest import answer, put_on, serving_app


def test_a_run_is_followed_from_version_to_version(base: Path, info: ModelInfo, tmp_path: Path) -> None:
    clock = Clock()
    context = opened(tmp_path / "aggregator", limits=Limits(newcomers_per_s=1000.0, requests_per_s=1000.0))
    context.now = clock
    sha256 = file_sha256(base)
    pair = (np.full((1, 64), 40.0, np.float32), np.zeros((64, 1), np.float32))  # large, so that little training changes an answer
    initial = adapter_bytes(Adapter("llama", 1.0, {MATRIX: pair}, metadata={BASE_KEY: sha256}))
    spec, _ = toy_run(
        "r", base={"sha256": sha256, "name": "tiny", "architecture": "llama"}, initial=hashlib.sha256(initial).hexdigest(), public=True
    )
    question = Asked(tuple(range(70, 110)), 12, Sampling(temperature=0))
    with serving_app(create_app(context)) as url, httpx.Client(base_url=url) as client, open_engine(base, n_ctx=256, n_threads=1) as engine:
        aggregator = Aggregator(context, client, clock)  # type: ignore[arg-type]  # httpx's client is what starlette's imitates
        source = AggregatorSource(url, "r", "latest", info)
        key = {"authorization": f"Bearer {context.secrets.admin}"}
        assert client.put(f"/v1/blobs/sha256:{spec.initial}", content=initial, headers=key).status_code == 201
        assert aggregator.admin("POST", "/v1/runs", spec.model_dump(mode="json")).status_code == 201
        first = source.poll()
        assert first is not None
        assert first.version == 0
        put_on(engine, first)
        before = answer(engine, question, tuned=True).text
        assert before == answer(engine, question).text, "an adapter whose B is zero changes nothing"
        member = aggregator.member()
        for _ in range(200):
            clock.at += 1.0
            if client.get("/v1/runs/r/versions/latest").json()["version"]:
                break
            given = member.send("POST", "/v1/runs/r/checkin", {"base": sha256}).json()
            if given["task"]:
                assert member.deliver(given["task"]).status_code == 200
        second = source.poll()
        assert second is not None
        told = client.get(f"/v1/runs/r/versions/{second.version}").json()
        assert (told["theta_digest"], told["adapter_sha256"]) == (second.digest, second.sha256)
        assert second.version
        put_on(engine, second)
        assert answer(engine, question, tuned=True).text != before
        assert source.poll() is None
        source.close()
    context.store.close()
