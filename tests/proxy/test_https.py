"""Servers behind https: whom the system trusts is asked, others are sent nothing."""

from __future__ import annotations

import threading

import httpx
import pytest
import trustme
import uvicorn

from tests.proxy.command import running
from tests.proxy.servers import WAIT_S, FakeEngine, Served, answers, gives_ticket, until


@pytest.fixture
def secure(tmp_path):
    """Return a decode engine behind https, its port, and the authority's certificate."""
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    engine, own = FakeEngine(answers), str(tmp_path / "own.pem")
    server = uvicorn.Server(
        uvicorn.Config(engine, port=0, log_config=None, lifespan="off", ssl_certfile=own, ssl_keyfile=own)
    )
    thread = threading.Thread(target=server.run, name="https", daemon=True)
    thread.start()
    until(lambda: server.started)
    yield engine, server.servers[0].sockets[0].getsockname()[1], str(tmp_path / "ca.pem")
    server.should_exit = True
    thread.join(WAIT_S)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("host", "trusted", "status"), [("localhost", True, 200), ("127.0.0.1", True, 502), ("localhost", False, 502)]
)
def test_a_server_is_asked_if_its_certificate_is_for_its_name_and_by_an_authority_that_is_trusted(
    secure, host, trusted, status
):
    engine, port, authority = secure
    env = {"SSL_CERT_FILE": authority} if trusted else {}
    with (
        Served(FakeEngine(gives_ticket)) as prefill,
        running("--prefill", prefill.url, "--decode", f"https://{host}:{port}", **env) as (_, url),
        httpx.Client(trust_env=False, timeout=WAIT_S, base_url=url) as client,
    ):
        answer = client.post("/v1/completions", json={"prompt": "x"})
        verdict = str(client.get("/health").json()["decode"])
    assert answer.status_code == status, answer.text
    assert len(engine.seen) == (status == 200)
    assert ("certificate" in verdict.lower()) == (status != 200)
