"""Make or renew a virtual environment with the project in it: `python setup_env.py .venv [extras]`.

Standard library only. The environment counts as ready when the stamp in it holds the digest of
what it was made from; the stamp goes first and comes back last, so that an interrupted run leaves
an environment that the next run makes anew. A folder that this script did not make is left alone.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "video,notebook,dev"
# What a package installer prints when it cannot reach the network.
NO_NETWORK = (
    "NewConnectionError",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "nodename nor servname",
    "ProxyError",
)
SHOWN = ("Collecting", "Building", "Installing", "ERROR", "error")


def digest(constraints: Path | None, extras: str) -> str:
    """What the environment is made from, as one string."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built_from = project["build-system"], project["project"]
    state = hashlib.sha256(repr((sys.version, sys.executable, ROOT, extras, built_from)).encode())
    for file in (ROOT / "setup.py", Path(__file__), constraints):
        if file:
            state.update(file.read_bytes())
    return state.hexdigest()


def run(command: list[str], log: Path) -> bool:
    """Run a command, write all it prints to a log, show its progress lines."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    assert process.stdout is not None
    try:
        with log.open("a") as out:
            for line in process.stdout:
                out.write(line)
                if line.lstrip().startswith(SHOWN):
                    print("  " + line.strip().split(" (from")[0][:90], flush=True)
        return process.wait() == 0
    finally:
        process.kill()  # an interrupted run leaves nobody behind who writes on


def explain(log: Path) -> str:
    """Why the last command failed, in words, as far as its log tells."""
    text = log.read_text()
    if any(sign in text for sign in NO_NETWORK):
        return "The package registry could not be reached: no network, or a proxy is missing."
    if "No space left on device" in text:
        return "The disk is full; the environment needs about 2 GB."
    tail = "\n".join("  " + line for line in text.splitlines()[-15:])
    return f"The installer's last lines:\n{tail}"


@contextlib.contextmanager
def alone(venv: Path) -> Iterator[None]:
    """Keeps two runs from working on one environment; the second waits."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    with venv.with_name(venv.name + ".lock").open("w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Another run is setting up {venv.name}; waiting for it ...", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(venv: Path, extras: str) -> str | None:
    """Returns None, or why there is no environment."""
    stamp, mark, log = venv / ".ready", venv / ".made-by-setup-env", venv / "setup.log"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    constraints = ROOT / "constraints" / f"py{version.replace('.', '')}.txt"
    pins = constraints if constraints.exists() else None
    wanted = digest(pins, extras)
    if stamp.exists() and stamp.read_text() == wanted:
        stamp.touch()
        return None
    if venv.exists() and not mark.exists() and any(venv.iterdir()):
        return f"{venv} exists but was not made by this project; move it away, or make VENV=other"

    started = time.monotonic()
    venv.mkdir(parents=True, exist_ok=True)
    mark.touch()
    stamp.unlink(missing_ok=True)
    for old in venv.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old != mark:
            old.unlink()
    print(f"Setting up {venv.name} with Python {version} (a minute or a few) ...", flush=True)
    if not run([sys.executable, "-m", "venv", str(venv)], log):
        return f"Python's venv module failed.\n{explain(log)}"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    pip += ["--retries", "3", "--timeout", "30"]
    if pins:
        pip += ["-c", str(pins)]
    else:
        print(f"  no tested versions for Python {version}: taking the newest that fit", flush=True)
    # The build tools come first, so that they too are the tested ones.
    builds = [*pip, "setuptools>=77", "wheel"]
    project = [*pip, "--no-build-isolation", "-e", f"{ROOT}[{extras}]"]
    if not (run(builds, log) and run(project, log)):
        return f"The packages could not be installed (log: {log}).\n{explain(log)}"
    stamp.write_text(wanted)
    print(f"  {venv.name} is ready after {time.monotonic() - started:.0f} s", flush=True)
    return None


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: setup_env.py FOLDER [EXTRAS]")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        folder = Path(sys.argv[1]).resolve()
        with alone(folder):
            problem = main(folder, sys.argv[2] if len(sys.argv) == 3 else EXTRAS)
    except KeyboardInterrupt:
        problem = "interrupted; the next run starts anew"
    sys.exit(f"\nsetup: {problem}" if problem else 0)
