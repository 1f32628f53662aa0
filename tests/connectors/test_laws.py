"""What vLLM's scheduler may rely on, over the connectors that run here."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect.testing.connector_tests import ConnectorTests

EXTRA = {"group": "test-laws", "lease_s": 2.0}


class TestKvConnectTcp(ConnectorTests):
    connector = "KvConnectTcp"
    extra_config = EXTRA


class TestKvConnectShm(ConnectorTests):
    connector = "KvConnectShm"
    extra_config = EXTRA
