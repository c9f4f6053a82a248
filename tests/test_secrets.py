"""Secrets stay where they are, and nobody on the network is asked: eight canaries, every channel, every address."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny
import yaml
from burnish.harness import faults
from burnish.harness.errors import ConfigError
from burnish.harness.redact import REMOVED, redact, secrets_in
from burnish.harness.run_dir import append_jsonl
from burnish.launch.cli import main

BURNISH = [sys.executable, "-m", "burnish.launch.cli"]
MODEL = "hf_" + "Ab1" * 8
OPENAI = "sk-" + "proj4" * 6
HEADER = "c4n4ry.header.value"
WANDB = "0123456789" * 4
PASSWORD = "pa55word-of-a-url"
QUERY = "signature-of-a-url"
OPAQUE = "n0thing like a key"
FILED = "hf_" + "Zy9" * 8
CANARIES = (MODEL, OPENAI, HEADER, WANDB, PASSWORD, QUERY, OPAQUE, FILED)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"401 for {MODEL}", MODEL),
        (f'{{"key": "{OPENAI}"}}', OPENAI),
        (f"Authorization: Bearer {HEADER}", HEADER),
        (f"WANDB_KEY={WANDB}", WANDB),
        (f"https://user:{PASSWORD}@host/x.jsonl: 404", PASSWORD),
        (f"https://host/x?a=1&X-Amz-Signature=b&sig={QUERY}", QUERY),
        ("ghp_" + "a1" * 18, "a1" * 18),
        ("AKIA" + "A" * 16, "AKIA"),
    ],
)
def test_what_looks_like_a_secret_is_removed_from_text(text, secret):
    assert secret not in redact(text)
    assert REMOVED in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text", ["hf_hub", "task-sk-1", "a" * 64, f"/snapshots/{WANDB}/", "https://host:80/x", "loss 1.0"]
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_of_secret_variables_are_removed_and_json_stays_json(monkeypatch, tmp_path):
    value = 'quoted "é" \\ value'
    monkeypatch.setenv("OWN_API_KEY", value)
    monkeypatch.setenv("OWN_TOKEN_PATH", "/etc/hostname-of-a-token")
    monkeypatch.setenv("MY_PASSWORD", "short")
    append_jsonl(tmp_path / "events.jsonl", {"event": "x", "a": [value], "b": "/etc/hostname-of-a-token short"})
    record = json.loads((tmp_path / "events.jsonl").read_text())
    assert record == {"event": "x", "a": [REMOVED], "b": "/etc/hostname-of-a-token short"}
    assert list(secrets_in({"a": [{"b": f"x {value}"}], "c": 1})) == [("a", 0, "b")]


def files_with(folder, words):
    """(file, word) for every word in the content or name of any file."""
    found = []
    for path in [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]:
        try:
            content = path.read_bytes()
        except OSError:  # gone meanwhile
            continue
        found += [(str(path), word) for word in words if word.encode() in content or word in str(path)]
    return found


def environment(folder):
    """Secrets as users have them: in variables and in the file of a library."""
    (folder / "hf").mkdir(exist_ok=True)
    (folder / "hf" / "token").write_text(FILED)
    return {
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": MODEL,
        "WANDB_API_KEY": WANDB,
        "OWN_SECRET": OPAQUE,
        "AWS_SECRET_ACCESS_KEY": OPENAI,
    }


def test_no_canary_leaves_a_run_by_any_channel(monkeypatch, tmp_path, capsys):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    config = tiny.write_config(tmp_path, train__max_steps=2, checkpoint={"every_steps": 1, "keep": 1})
    refused = (
        [f"name={OPENAI}"],
        [f"--token={OPENAI}"],
        [f"data.train.0.path=https://user:{PASSWORD}@127.0.0.1:9/x.jsonl"],
        [f"data.train.0.path=https://127.0.0.1:9/x.jsonl?a=1&sig={QUERY}"],
        [f"data.train.0.path={tmp_path}/{MODEL}/rows.jsonl"],
        [f"model.tokenizer={OPAQUE}"],
        [f"generation.prompts=[Bearer {HEADER}]"],
    )
    for overrides in refused:
        assert main(["train", str(config), *overrides]) == 2
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(tiny.run_config(tmp_path) | {"seed": MODEL}))
    assert main(["train", str(tmp_path / "bad.yaml")]) == 2
    assert not (tmp_path / "runs" / "tiny").exists()

    def fail():
        words = (
            f"{MODEL} {OPENAI} {OPAQUE} {WANDB} Bearer {HEADER} https://u:{PASSWORD}@h/?a=b&sig={QUERY} token {FILED}"
        )
        raise RuntimeError(words)

    faults.arm("save.before_manifest", fail)
    try:
        assert main(["train", str(config)]) == 5
    finally:
        faults.disarm()
    assert main(["train", str(config), "--resume", "--json"]) == 0
    seen = capsys.readouterr()
    assert REMOVED in seen.err
    assert not [word for word in CANARIES if word in seen.out + seen.err]
    assert not files_with(tmp_path / "runs", CANARIES)
    assert not files_with(tmp_path / "tmp", CANARIES)


# The network

connects = []


def _note_connect(event, arguments):
    if connects and event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        connects.append((event, arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]))


def is_local(address):
    host = address[0] if isinstance(address, tuple) else address
    return host in (None, "", "localhost", "127.0.0.1", "::1") or str(host).startswith(("/", "\0"))


def test_an_inline_run_asks_nobody_on_the_network(tmp_path, capsys):
    sys.addaudithook(_note_connect)
    connects.append(("begin", None))
    try:
        assert main(["train", str(tiny.write_config(tmp_path, train__max_steps=1))]) == 0, capsys.readouterr().err
    finally:
        found = connects[1:]
        connects.clear()
    assert not [(event, address) for event, address in found if not is_local(address)]


CONNECT = re.compile(r"connect\(\d+, \{sa_family=(AF_\w+), (?:sin6?_port=htons\(\d+\), )?(.*?)\}, ")


def outside(trace):
    """Addresses of the internet, but not this machine's own, in what strace wrote."""
    found = [match for line in trace.splitlines() if (match := CONNECT.search(line))]
    named = [match[2] for match in found if match[1] in ("AF_INET", "AF_INET6")]
    return [text for text in named if '"127.' not in text and '"::1"' not in text and '"::ffff:127.' not in text]


def test_the_traced_lines_are_understood():
    local = 'connect(3, {sa_family=AF_INET, sin_port=htons(6379), sin_addr=inet_addr("127.0.0.1")}, 16) = 0'
    other = 'connect(3, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("10.1.2.3")}, 16) = -1'
    six = 'connect(3, {sa_family=AF_INET6, sin6_port=htons(443), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "fe80::1"'
    assert outside(local) == []
    assert outside('connect(3, {sa_family=AF_UNIX, sun_path="/tmp/x"}, 110) = 0') == []
    assert len(outside(other)) == len(outside(six + ", &sin6_addr), sin6_scope_id=0}, 28) = -1")) == 1


def nameservers():
    """Of this machine. torch's TCPStore asks for the name of whom it is connected with, also of ::ffff:127.0.0.1."""
    found = re.findall(r"^nameserver\s+(\S+)", Path("/etc/resolv.conf").read_text(), re.MULTILINE)
    return [f'sin_addr=inet_addr("{address}")' for address in found]


needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("strace") or not shutil.which("ip"), reason="needs root, strace and ip"
)
RAY = {"type": "ray", "num_workers": 2}


@pytest.mark.nightly
@needs_root
@pytest.mark.parametrize("launch", [{"type": "inline"}, RAY], ids=["inline", "ray"])
def test_a_run_without_a_route_succeeds_and_connects_to_this_machine_only(tmp_path, launch):
    config = tiny.write_config(tmp_path, launch=launch, train__max_steps=2)
    trace = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(tmp_path / "trace")]
    inside = 'ip link set lo up && exec "$@"'
    command = ["unshare", "-n", "sh", "-c", inside, "sh", *trace, *BURNISH, "train", str(config)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    text = (tmp_path / "trace").read_text(errors="replace")
    assert "connect(" in text
    names = nameservers() if launch is RAY else []
    assert [address for address in outside(text) if address not in names] == []


# The embedded cluster


def test_an_embedded_cluster_has_a_token_of_its_own_and_no_dashboard(tmp_path, monkeypatch):
    from burnish.launch import ray_cluster
    from burnish.launch.resources import detect

    given_options = {}
    monkeypatch.setattr(ray_cluster, "_init", lambda **options: given_options.update(options))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    for name in ray_cluster.SETTINGS:
        monkeypatch.setenv(name, "x")
    ray_cluster._start(detect(), tmp_path)
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert len((tmp_path / "token").read_text()) >= 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert (given_options["address"], given_options["include_dashboard"]) == ("local", False)


def test_a_cluster_without_tokens_is_not_joined(monkeypatch):
    from burnish.launch import ray_cluster

    monkeypatch.setattr(ray_cluster, "_init", lambda **_options: pytest.fail("connected"))
    monkeypatch.setattr(ray_cluster, "is_token_auth_enabled", lambda: False)
    with pytest.raises(ConfigError, match="without token authentication"):
        ray_cluster._connect("127.0.0.1:1")


def descriptions(mark):
    """Command lines of all processes with this word in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


@pytest.mark.nightly
def test_a_run_on_ray_keeps_secrets_out_of_its_session_and_its_folder_to_itself(tmp_path):
    config = tiny.write_config(tmp_path, launch=RAY, train__max_steps=40, checkpoint={"every_steps": 20})
    folder = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    mark = f"BURNISH_TEST={folder.name}"
    variables = os.environ | environment(tmp_path) | {"TMPDIR": str(folder), "BURNISH_TEST": folder.name}
    variables |= {"HOME": str(tmp_path / "hf")}
    modes, leaks, commands = set(), [], set()
    with (tmp_path / "output").open("w") as output:
        run = subprocess.Popen(
            [*BURNISH, "train", str(config)], cwd=tmp_path, env=variables, stdout=output, stderr=output
        )
        try:
            while run.poll() is None:
                modes |= {("folder", stat.S_IMODE(path.stat().st_mode)) for path in folder.glob("burnish-*")}
                modes |= {("token", stat.S_IMODE(path.stat().st_mode)) for path in folder.glob("burnish-*/token")}
                leaks += files_with(folder, CANARIES)
                commands |= set(descriptions(mark))
                time.sleep(0.5)
            assert run.returncode == 0, (tmp_path / "output").read_text()[-3000:]
        finally:
            run.kill()
            run.wait()
            left = list(folder.glob("burnish-*"))
            shutil.rmtree(folder, ignore_errors=True)
    assert modes == {("folder", 0o700), ("token", 0o600)}
    assert not leaks
    assert not [command for command in commands for word in CANARIES if word in command]
    assert [command for command in commands if "raylet" in command], "the cluster was seen"
    assert not files_with(tmp_path / "runs", CANARIES)
    assert not [word for word in CANARIES if word in (tmp_path / "output").read_text()]
    assert not left
