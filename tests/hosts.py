"""Several hosts on one machine: network namespaces joined by a bridge, each with its own node of one Ray cluster.

    python tests/hosts.py [--hosts 2] [--cpus 1] [--folder DIR] -- COMMAND …

starts the cluster, runs COMMAND in one more host that has no Ray of its own, and takes everything down again. Each
host has an address 10.99.0.N that only the others can reach, a temporary folder of its own at the same path, and the
cluster's token in a file of mode 0600. Storage is shared, but for `folder/local`, which every host has for itself.
Needs root, `ip` and Linux; `is_possible` tells.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PORT, DASHBOARD_PORT = 6379, 8265
ADDRESS = "10.99.0.{}"
CLIENT = "client"
START_TIMEOUT_S = 90
END_GRACE_S = 5.0
BIN = Path(sys.executable).parent
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
PASSED_ON_PREFIXES = ("BURNISH_", "DS_", "TORCH_")


def is_possible():
    """Whether namespaces can be made here."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"burnish-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return False
    subprocess.run(["ip", "netns", "del", name], check=True)
    return True


class Hosts:
    """Namespaces, and the Ray nodes in them, while it is entered. `folder` holds logs and what the hosts share."""

    def __init__(self, folder, *, num_hosts=2, num_cpus=1, **environment):
        self.folder, self.num_hosts, self.num_cpus, self.environment = Path(folder), num_hosts, num_cpus, environment
        self.prefix = f"burnish-{os.getpid()}-{secrets.token_hex(2)}"
        self.local = self.folder / "local"
        self.names = [*(f"host{number}" for number in range(num_hosts)), CLIENT]
        self.processes = {}
        self.token = self.folder / "token"

    @property
    def url(self):
        return f"http://{ADDRESS.format(1)}:{DASHBOARD_PORT}"

    def __enter__(self):
        # The paths of Ray's sockets end at 107 characters, so its folder is not below the test's.
        self.temp = Path(tempfile.mkdtemp(prefix="bh-", dir="/tmp"))
        self.local.mkdir(parents=True)
        self.token.touch(0o600)
        self.token.write_text(secrets.token_hex(32))
        try:
            self._wire()
            for name in self.names[:-1]:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in reversed(self.names):
            self.kill(name, signal.SIGTERM)
        deadline = time.monotonic() + END_GRACE_S
        while any(self.pids(name) for name in self.names) and time.monotonic() < deadline:
            time.sleep(0.1)
        for name in self.names:
            while self.pids(name):
                self.kill(name, signal.SIGKILL)
                time.sleep(0.1)
        for process in self.processes.values():
            process.wait()
        for name in (*self.names, "bridge"):
            subprocess.run(["ip", "netns", "del", self.namespace(name)], capture_output=True)
        shutil.rmtree(self.temp, ignore_errors=True)

    def namespace(self, name):
        return f"{self.prefix}-{name}"

    def pids(self, name):
        """Every process in the namespace of a host."""
        done = subprocess.run(["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True)
        return [int(line) for line in done.stdout.split()]

    def kill(self, name, number):
        for pid in self.pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def link(self, name, state):
        """Plugs a host in (`up`) or out (`down`)."""
        _ip("-n", self.namespace("bridge"), "link", "set", f"to-{name}", state)

    def _wire(self):
        _ip("netns", "add", self.namespace("bridge"))
        bridge = ("-n", self.namespace("bridge"))
        _ip(*bridge, "link", "add", "bridge", "type", "bridge")
        _ip(*bridge, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names, start=1):
            space = self.namespace(name)
            _ip("netns", "add", space)
            _ip(*bridge, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip(*bridge, "link", "set", f"to-{name}", "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{ADDRESS.format(number)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def start(self, name):
        """Starts the Ray node of a host and waits until it has joined."""
        number = self.names.index(name) + 1
        address = ADDRESS.format(number)
        own = [f"--node-ip-address={address}", f"--num-cpus={self.num_cpus}", "--object-store-memory=100000000"]
        own += ["--disable-usage-stats", "--block"]
        if number == 1:
            own += ["--head", f"--port={PORT}", f"--temp-dir={self.temp / 'ray'}"]
            own += [f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD_PORT}"]
        else:
            own += [f"--address={ADDRESS.format(1)}:{PORT}"]
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            command = self._command(name, [str(BIN / "ray"), "start", *own])
            self.processes[name] = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self._environment()
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while "--block" not in (text := log.read_text()):
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Ray on {name}:\n{text[-3000:]}")
            time.sleep(0.1)

    def _environment(self, **changes):
        kept = {key: os.environ[key] for key in os.environ if key in PASSED_ON or key.startswith(PASSED_ON_PREFIXES)}
        own = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        return {key: value for key, value in (kept | own | self.environment | changes).items() if value is not None}

    def _command(self, name, command):
        """In the namespace of the host, with its own temporary and local folders at the paths that all have."""
        mounts = ""
        for place in (self.temp, self.local):
            inside = self.folder / "disks" / name / place.name
            inside.mkdir(parents=True, exist_ok=True)
            inside.chmod(0o700)
            mounts += f'mount --bind "{inside}" "{place}" && '
        shell = ["sh", "-c", f'{mounts}exec "$@"', "sh", *map(str, command)]
        return ["ip", "netns", "exec", self.namespace(name), *shell]

    def run(self, command, *, name=CLIENT, timeout=120, cwd=None, **environment):
        """The finished process of a command in a host; None as a variable's value removes it."""
        return subprocess.run(
            self._command(name, command),
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd or self.folder,
            env=self._environment(**environment),
        )

    def popen(self, command, *, name=CLIENT, cwd=None, **options):
        """A running process in a host; __exit__ ends it if it is left."""
        return subprocess.Popen(
            self._command(name, command), text=True, cwd=cwd or self.folder, env=self._environment(), **options
        )

    def burnish(self, *arguments, **options):
        return self.run([BIN / "python", "-m", "burnish.launch.cli", *arguments], **options)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2, help="Ray nodes; default: 2")
    parser.add_argument("--cpus", type=int, default=1, help="of each node; default: 1")
    parser.add_argument("--folder", help="logs and shared storage; default: a temporary one that is removed")
    parser.add_argument("command", nargs="+", help="what to run in the host without Ray")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        hosts = stack.enter_context(Hosts(folder, num_hosts=options.hosts, num_cpus=options.cpus))
        print(f"{hosts.url}, token in {hosts.token}", flush=True)
        raise SystemExit(hosts.popen(options.command, cwd=os.getcwd()).wait())


if __name__ == "__main__":
    main()
