"""Reaching a job server: with our token only, at plain URLs only, and whatever it says as one sentence."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from burnish.harness.errors import BurnishError
from burnish.launch import jobs
from burnish.launch.cli import main

URL = "http://10.0.0.1:8265"
TOKEN = "a7" * 32


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


class Cluster(BaseHTTPRequestHandler):
    """Answers as a dashboard does: with `token`, only to those who have it."""

    token, seen = None, []

    def do_GET(self):
        given = self.headers.get("Authorization")
        type(self).seen.append(given)
        status = 200 if self.token is None or given == f"Bearer {self.token}" else 403 if given else 401
        self.send_response(status)
        self.end_headers()
        text = {"ray_version": "2.60.0", "version": "4"} if status == 200 else "Unauthorized"
        self.wfile.write(json.dumps(text).encode())

    def log_message(self, *_):
        pass


CONNECT = """
import sys
from argparse import Namespace
from burnish.launch.job_commands import _server
from burnish.harness.errors import BurnishError
for url in sys.argv[1:]:
    try:
        print(type(_server(Namespace(address=url)).client).__name__)
    except BurnishError as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def dashboard():
    Cluster.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Cluster) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def connected(*urls, **environment):
    """What each address leads to, in a process of its own: Ray reads the token once."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-c", CONNECT, *urls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=kept | environment)
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_only_a_cluster_that_asks_for_our_token_is_used(dashboard, tmp_path, monkeypatch):
    monkeypatch.setattr(Cluster, "token", TOKEN)
    good, bad = tmp_path / "token", tmp_path / "wrong"
    good.write_text(TOKEN)
    bad.write_text("b8" * 32)
    nowhere = "http://127.0.0.1:9"
    assert connected(dashboard, dashboard + "/", nowhere, RAY_AUTH_TOKEN_PATH=str(good))[:2] == [
        "JobSubmissionClient",
        "JobSubmissionClient",
    ]
    assert f"Bearer {TOKEN}" in Cluster.seen
    [refused, silent] = connected(dashboard, nowhere, RAY_AUTH_TOKEN_PATH=str(bad))
    assert "refuses the token (403)" in refused
    assert "no Ray cluster answers at" in silent
    [missing] = connected(dashboard, HOME=str(tmp_path))
    assert "asks for a token (401) and there is none here" in missing
    monkeypatch.setattr(Cluster, "token", None)
    [open_to_all] = connected(dashboard, RAY_AUTH_TOKEN_PATH=str(good))
    assert "asks for no token" in open_to_all


ADDRESSES = ("10.0.0.1:8265", "ray://10.0.0.1:10001", "http://user:secret@10.0.0.1", "file:///etc/passwd", "")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_a_plain_url(capsys, monkeypatch, address):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_ADDRESS", "")
    code, _, err = run(capsys, "jobs", "--address", address)
    assert code == 2
    assert "--address" in err
    assert "secret" not in err
    assert err.count("\n") == 1


def test_without_an_address_it_is_asked_for(capsys, monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = run(capsys, "jobs")
    assert code == 2
    assert "no cluster given; use --address" in err


SERVER_ERRORS = {
    "agent": (RuntimeError("Request failed with status code 500: No available agent to submit job"), "agent"),
    "gone": (ConnectionError("Failed to connect"), "Failed to connect"),
    "unforeseen": (RuntimeError("Request failed with status code 500: boom\nTraceback"), "boom"),
}


@pytest.mark.parametrize("name", SERVER_ERRORS)
def test_what_the_server_says_is_one_sentence(name):
    error, words = SERVER_ERRORS[name]
    with pytest.raises(BurnishError, match=words) as raised, jobs.explained(URL):
        raise error
    assert "\n" not in str(raised.value)
