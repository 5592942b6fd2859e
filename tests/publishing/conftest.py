"""The stand-in for the Hub, and this process told to talk to it."""

import time
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

from tests.hub_stand_in import TOKEN, HubStandIn


@pytest.fixture
def hub(monkeypatch):
    """A running stand-in with which huggingface_hub in this process is connected."""
    with HubStandIn() as stand_in:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # the client waits seconds between its own attempts; nothing here needs that time
        quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        monkeypatch.setattr(huggingface_hub.utils._http, "time", quick)
        yield stand_in
