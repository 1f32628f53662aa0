"""The laws of connectors as pytest tests: subclass `ConnectorTests` for a connector of your own.

    class TestMyConnector(ConnectorTests):
        connector = "MyConnector"
        extra_config = {"lease_s": 2}

vLLM has to be installed; no engine, model or device is started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvconnect import _plugin
from kvconnect.testing.connector_laws import LAWS, Deployment, Law
from kvconnect.testing.engine import describe_model


class ConnectorTests:
    """Every law over ``connector``, with one worker and with two tensor-parallel ones."""

    #: Its name in vLLM's factory.
    connector: ClassVar[str]
    #: ``kv_connector_extra_config`` of both engines.
    extra_config: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
    def engines(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
        """A producer and a consumer."""
        _plugin.register()
        opened = Deployment.open(describe_model(tmp_path), self.connector, self.extra_config, request.param)
        yield opened
        opened.close()

    @pytest.mark.parametrize("law", LAWS, ids=[law.__name__ for law in LAWS])
    def test_law(self, engines: Deployment, law: Law) -> None:
        """One law about whole lives of requests."""
        law(engines)
