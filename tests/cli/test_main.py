"""The whole command line: every help is printed without loading what runs models or opens sockets."""

import subprocess
import sys

HEAVY = {"onnxruntime", "aiohttp", "numpy", "zeroconf", "tokenizers", "msgpack", "cryptography"}
HEAVY |= {"rich", "segno", "prometheus_client"}
COMMANDS = (
    *((), ("node",), ("generate",), ("serve",), ("demo",), ("devices",), ("doctor",), ("plan",), ("key",), ("bench",)),
    *(("trace",), ("cache",), ("cache", "list"), ("cache", "prune"), ("key", "api"), ("key", "api", "add")),
    *(("chat",), ("top",), ("support",)),
)


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from flowspec_edge.cli.main import main
for command in {COMMANDS!r}:
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
    else:
        raise AssertionError("help has not ended the program")
print(*sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.count("usage: flowspec ") == len(COMMANDS)
    assert not HEAVY & {name.partition(".")[0] for name in out.splitlines()[-1].split()}
